"""A small configuration of any model type of transformers, made from its default one by rules about field names.

A type whose fields follow the common names needs no entry here; `OF_A_TYPE` holds what cannot be told from a name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY, WIDTH, HEADS, HEAD = 128, 64, 4, 16

# Field names, with what they are set to where the default is larger.
_RULES: dict[int, str] = {
    VOCABULARY: "vocab_size n_vocab emb_size vocabulary_size max_position_embeddings n_positions n_ctx max_seq_len "
    "max_sequence_length max_context_length original_max_position_embeddings context_length seq_length seq_len "
    "max_target_positions max_source_positions max_2d_position_embeddings moe_intermediate_size_ffn max_length "
    "vocab_size_per_layer_input entity_vocab_size num_buckets_positions",
    WIDTH: "hidden_size d_model n_embd dim model_dim embed_dim emb_dim embedding_size hidden_dim_size "
    "word_embed_proj_dim d_embed embedding_dim entity_emb_size lru_width d_proj projection_dim bottleneck_size "
    "hidden_size_per_layer_input conv_dim input_embedding_size output_embedding_size true_hidden_size decoder_hidden_size",
    96: "intermediate_size ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner hidden_dim "
    "feed_forward_size d_inner dff dim_ff intermediate_size_mlp prefix_dense_intermediate_size "
    "dense_intermediate_size block_ff_dim linear_intermediate_size ffn_intermediate_size expert_ffn_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_dim "
    "shared_intermediate_size q_lora_rank kv_lora_rank index_head_dim qk_head_dim o_lora_rank moe_latent_size "
    "d_rel_embed position_buckets attention_window rank",
    HEAD: "head_dim d_kv kv_channels attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "global_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head attention_head_dim "
    "swa_head_dim swa_v_head_dim axial_head_dim",
    8: "sliding_window window_size local_attention window attention_chunk_size state_size mamba_d_state "
    "ssm_state_size time_step_rank mamba_dt_rank index_topk linear_num_value_heads mamba_num_heads mamba_n_heads "
    "block_size lru_block_width max_patch_size",
    # Chunks of states shorter than the pieces that a survey feeds.
    HEADS: "chunk_size mamba_chunk_size num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_query_heads linear_num_key_heads index_n_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts num_routed_experts n_experts num_attention_query_heads num_global_heads "
    "swa_num_attention_heads num_ngram_decoder_heads n_hash_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads n_head_kv num_key_value_groups mamba_n_groups n_groups "
    "num_experts_per_tok num_experts_per_token moe_top_k moe_topk moe_k top_k "
    "experts_per_token top_k_experts num_global_key_value_heads swa_num_key_value_heads kv_heads num_blocks "
    "num_logits_to_keep_layers n_encoder_layers n_decoder_layers zero_expert_num",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers "
    "first_k_dense_replace moe_layer_start_index num_dense_layers num_hidden_groups num_kv_shared_layers "
    "num_shared_expert",
}  # fmt: skip
_LIMIT = {name: limit for limit, names in _RULES.items() for name in names.split()}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "layers_block_type", "block_types")

_MAMBA = dict(mamba_n_heads=8, mamba_d_head=HEAD, mamba_expand=2)
# What the field names do not tell: sizes that must agree, a pattern of layers that is computed.
OF_A_TYPE: dict[str, dict[str, Any]] = {
    "bamba": dict(_MAMBA, num_hidden_layers=3, attn_layer_indices=[1]),
    "falcon_h1": dict(_MAMBA, mamba_d_ssm=128),
    "granitemoehybrid": dict(_MAMBA, num_hidden_layers=3, layers_block_type=["mamba", "attention", "mamba"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "recurrent_gemma": dict(num_hidden_layers=3, head_dim=HEAD),
    "lfm2_moe": dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=HEAD),
    "zamba": dict(num_hidden_layers=4, layer_types=["mamba", "hybrid", "mamba", "hybrid"]),
    "deepseek_v2": dict(num_experts_per_tok=2, num_key_value_heads=HEADS),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "esmc": dict(num_key_value_heads=HEADS),
    "dots3_note": dict(num_key_value_heads=HEADS),
    "dots3_note_text": dict(num_key_value_heads=HEADS),
    "prophetnet": dict(num_encoder_layers=2, num_decoder_layers=2),
    "funnel": dict(block_sizes=[1, 1], d_head=HEAD),
    "mobilebert": dict(embedding_size=WIDTH, true_hidden_size=WIDTH, intra_bottleneck_size=WIDTH),
    "lilt": dict(channel_shrink_ratio=4, hidden_size=96),
    "mistral4": dict(num_key_value_heads=HEADS, qk_head_dim=2 * HEAD, v_head_dim=HEAD),
    "esm": dict(vocab_size=33, pad_token_id=1, mask_token_id=32),
    "xmod": dict(default_language="en_XX"),
    "reformer": dict(axial_pos_shape=[8, 16], axial_pos_embds_dim=[32, 32], is_decoder=True),
    "reformer_encoder": dict(axial_pos_shape=[8, 16], axial_pos_embds_dim=[32, 32]),
    "gemma4_assistant": dict(),
    "xlstm": dict(num_heads=HEADS, qk_dim_factor=1.0),
    "qwen4_exp": dict(),
}
# Layers of these are made by the type itself from their number.
_COUNT_COMES_FROM_ELSEWHERE = ("prophetnet", "funnel")


def tiny_model(cls: type[PreTrainedModel], model_type: str) -> PreTrainedModel:
    """A model of `cls` with random weights, the same every time; nothing is zero or one that need not be."""
    torch.manual_seed(0)
    config = tiny_configuration(cls.config_class, model_type)
    # Classes with two uses are told which by their configuration.
    if cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "Decoder")) and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_configuration(config_class: type[PreTrainedConfig], model_type: str) -> PreTrainedConfig:
    """A configuration with one layer of each kind that the default one has, at least two."""
    default = config_class()
    kind = model_type.removesuffix("_encoder").removesuffix("_seq2seq")
    chosen = shrunk(default) | OF_A_TYPE.get(model_type, OF_A_TYPE.get(kind, {}))
    if kind in _COUNT_COMES_FROM_ELSEWHERE:
        chosen = {name: value for name, value in chosen.items() if name not in _LAYERS}
    config = config_class(**copy.deepcopy(chosen))
    return config


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of the configuration's class that make it small."""
    fields = {**{name: getattr(default, name, None) for name in getattr(default, "attribute_map", {})}, **vars(default)}
    chosen: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bool) or name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            chosen[name] = shrunk(value)
        elif isinstance(value, int) and name in _LIMIT and value > _LIMIT[name]:
            chosen[name] = _LIMIT[name]
        elif isinstance(value, int) and name.endswith("_token_id") and value >= VOCABULARY:
            chosen[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
        elif isinstance(value, list) and name.endswith("_token_id"):
            chosen[name] = [2]
    # A default that a width was meant to be divided into; latent attention has as many heads for keys as for queries.
    missing = {"head_dim": HEAD, "num_key_value_heads": 2}
    chosen |= {name: size for name, size in missing.items() if vars(default).get(name, size) is None}
    if isinstance(vars(default).get("kv_lora_rank"), int):
        chosen |= {name: HEADS for name in ("num_key_value_heads",) if name in vars(default)}
    chosen |= _layers(default)
    return {name: value for name, value in chosen.items() if _settable(type(default), name)}


def _settable(cls: type, name: str) -> bool:
    found = getattr(cls, getattr(cls, "attribute_map", {}).get(name, name), None)
    return not isinstance(found, property) or found.fset is not None


def _layers(default: PreTrainedConfig) -> dict[str, Any]:
    """One layer of each kind; lists with an entry for each layer are cut in the same way."""
    count = next((n for name in _LAYERS if isinstance(n := getattr(default, name, None), int)), None)
    if count is None:
        return {}
    lists = {
        name: list(value)
        for name, value in {**vars(default), **{k: getattr(default, k, None) for k in _KINDS}}.items()
        if isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_") and count > 2
    }
    texts = {name: value for name, value in lists.items() if all(isinstance(item, str) for item in value)}
    kinds = list(zip(*texts.values(), strict=True)) if texts else []
    first = sorted({kind: at for at, kind in reversed(list(enumerate(kinds)))}.values())
    kept = first if len(first) >= 2 else [0, 1] if count > 1 else [0]
    chosen: dict[str, Any] = {name: [value[at] for at in kept] for name, value in lists.items()}
    for name in _LAYERS:
        if isinstance(getattr(default, name, None), int):
            chosen[name] = len(kept)
    return chosen


def classes() -> dict[str, tuple[str, str]]:
    """`{model type: (class name, form)}`: form `decoder` for a causal language model, else `encoder`, of token ids."""
    from transformers.models.auto import modeling_auto as auto

    found = {name: (cls, "decoder") for name, cls in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    encoders = {**auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    for extra in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        if extra not in found:
            encoders.setdefault(extra, "")
    for name, cls in encoders.items():
        base = auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(name) or auto.MODEL_MAPPING_NAMES.get(name, cls)
        base = base[0] if isinstance(base, (tuple, list)) else base
        if base:
            found[f"{name}_encoder" if name in found else name] = (base, "encoder")
    for name, cls in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name if name not in found else f"{name}_seq2seq", (cls, "encoder-decoder"))
    return {name: item for name, item in found.items() if hasattr(transformers, item[0])}
