"""Tiny models with random weights, one for each architecture that the tests run: `tiny("llama")`.

Wide enough (hidden 256) for groups of 128 and for real head layouts, small enough (2 layers, 512 tokens) to be captured
in seconds. Heads are grouped where the architecture can group them.
"""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 512

_LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_HEAD_DIM = dict(_LLAMA, head_dim=64)
_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
)
_GPT = dict(
    vocab_size=VOCABULARY,
    n_embd=256,
    n_layer=2,
    n_head=4,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_MOE = dict(_HEAD_DIM, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)
_DEEPSEEK = dict(
    _LLAMA,
    num_key_value_heads=4,
    moe_intermediate_size=128,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=64,
    q_lora_rank=64,
    qk_rope_head_dim=32,
    qk_nope_head_dim=32,
    v_head_dim=64,
)

# model_type -> (model class, configuration). The first block runs in every test run, the second under --exhaustive.
DECODERS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _HEAD_DIM),
    "mistral": ("MistralForCausalLM", dict(_HEAD_DIM, sliding_window=8)),
    "gemma2": ("Gemma2ForCausalLM", dict(_HEAD_DIM, sliding_window=8, query_pre_attn_scalar=64)),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        dict(
            _HEAD_DIM, sliding_window=8, query_pre_attn_scalar=64, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "phi3": ("Phi3ForCausalLM", dict(_LLAMA, original_max_position_embeddings=256)),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", _NEOX),
    "opt": (
        "OPTForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            ffn_dim=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "bloom": (
        "BloomForCausalLM",
        dict(
            vocab_size=VOCABULARY, hidden_size=256, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
    ),
    "falcon": (
        "FalconForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            new_decoder_architecture=False,
            alibi=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "mixtral": ("MixtralForCausalLM", dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
}

ENCODERS: dict[str, tuple[str, dict]] = {
    "bert": ("BertModel", _BERT),
    "roberta": ("RobertaModel", dict(_BERT, pad_token_id=1, type_vocab_size=1)),
    "distilbert": (
        "DistilBertModel",
        dict(vocab_size=VOCABULARY, dim=256, hidden_dim=512, n_layers=2, n_heads=4, max_position_embeddings=128),
    ),
    "modernbert": (
        "ModernBertModel",
        dict(
            _BERT,
            local_attention=16,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
}

MORE_DECODERS: dict[str, tuple[str, dict]] = {
    "starcoder2": ("Starcoder2ForCausalLM", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", _LLAMA),
    "cohere": ("CohereForCausalLM", _LLAMA),
    "stablelm": ("StableLmForCausalLM", _LLAMA),
    "granite": ("GraniteForCausalLM", _LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA),
    "phi": ("PhiForCausalLM", _LLAMA),
    "gemma": ("GemmaForCausalLM", _HEAD_DIM),
    "gptj": ("GPTJForCausalLM", dict(_GPT, rotary_dim=32)),
    "codegen": ("CodeGenForCausalLM", dict(_GPT, rotary_dim=32)),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", dict(_GPT, multi_query=True)),
    "mpt": (
        "MptForCausalLM",
        dict(
            vocab_size=VOCABULARY, d_model=256, n_heads=4, n_layers=2, max_seq_len=128, bos_token_id=1, eos_token_id=2
        ),
    ),
    "falcon_alibi": (
        "FalconForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            new_decoder_architecture=False,
            alibi=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "falcon_grouped": (
        "FalconForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "gpt_oss": ("GptOssForCausalLM", dict(_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "olmoe": ("OlmoeForCausalLM", dict(_LLAMA, intermediate_size=128, num_experts=4, num_experts_per_tok=2)),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        dict(_LLAMA, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2),
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        dict(_LLAMA, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2),
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=128,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _DEEPSEEK),
    "glm4_moe": ("Glm4MoeForCausalLM", dict(_MOE, n_routed_experts=4, first_k_dense_replace=1)),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", dict(_MOE, moe_num_experts=4, moe_k=2)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", dict(_MOE, shared_expert_intermediate_size=128)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MOE),
    "xglm": (
        "XGLMForCausalLM",
        dict(
            vocab_size=VOCABULARY,
            d_model=256,
            ffn_dim=512,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
}

MORE_ENCODERS: dict[str, tuple[str, dict]] = {
    "electra": ("ElectraModel", dict(_BERT, embedding_size=128)),
    "albert": ("AlbertModel", dict(_BERT, embedding_size=128)),
    "mpnet": ("MPNetModel", dict(_BERT, pad_token_id=1)),
    "deberta-v2": (
        "DebertaV2Model",
        dict(
            _BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=32,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
            position_biased_input=False,
        ),
    ),
    "camembert": ("CamembertModel", dict(_BERT, pad_token_id=1)),
    "xlm-roberta": ("XLMRobertaModel", dict(_BERT, pad_token_id=1)),
    "t5_encoder": (
        "T5EncoderModel",
        dict(vocab_size=VOCABULARY, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, pad_token_id=0),
    ),
    "bert_classifier": ("BertForSequenceClassification", dict(_BERT, num_labels=3)),
    "bert_masked_lm": ("BertForMaskedLM", _BERT),
    "distilbert_classifier": (
        "DistilBertForSequenceClassification",
        dict(vocab_size=VOCABULARY, dim=256, hidden_dim=512, n_layers=2, n_heads=4, max_position_embeddings=128),
    ),
    "modernbert_classifier": (
        "ModernBertForSequenceClassification",
        dict(
            _BERT,
            local_attention=16,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
}

ALWAYS = [*DECODERS, *ENCODERS]
EXHAUSTIVE = [*MORE_DECODERS, *MORE_ENCODERS]
_ALL = {**DECODERS, **ENCODERS, **MORE_DECODERS, **MORE_ENCODERS}


def is_decoder(model_type: str) -> bool:
    return model_type in DECODERS or model_type in MORE_DECODERS


def tiny(model_type: str) -> transformers.PreTrainedModel:
    """A two-layer model of that type with random weights; the same weights every time."""
    class_name, options = _ALL[model_type]
    cls = getattr(transformers, class_name)
    config = cls.config_class(**options)
    torch.manual_seed(0)
    model = cls(config).eval()
    # Biases and norms start as zeros and ones: a bias that was dropped or a norm folded wrongly would go unseen.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.do_sample = False
    return model
