"""Every architecture in the table, captured, normalised and analysed: the same function, with every weight found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qcompiler.graph.constants import attribute, storage_key
from qcompiler.passes.analyse.find_groups import input_value
from tests.captures import Stepper, analysed, relative_error
from tests.models import ALWAYS, EXHAUSTIVE, VOCABULARY, is_decoder

EVERY = [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in EXHAUSTIVE)]
DECODERS = [param for param in EVERY if is_decoder(param if isinstance(param, str) else param.values[0])]
ENCODERS = [param for param in EVERY if param not in DECODERS]

TOLERANCE = 1e-5


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_gives_the_same_logits_at_every_length_and_past(model_type: str) -> None:
    made = analysed(model_type)
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = made.model(input_ids=tokens).logits
    step = Stepper(made.graph.module, made.prepared)
    # A prefill of one token, of several, single steps, and on past every sliding window (8) of the table.
    for new in (1, 6, 1, 5, 1, 10):
        start = step.past
        logits = step(tokens[:, start : start + new])
        assert relative_error(logits, expected[:, start : start + new]) < TOLERANCE, f"{new} tokens after {start}"


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_whole_prompt_in_one_step(model_type: str) -> None:
    made = analysed(model_type)
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = made.model(input_ids=tokens).logits
    assert relative_error(Stepper(made.graph.module, made.prepared)(tokens), expected) < TOLERANCE


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 17), (1, 5)])
def test_an_encoder_gives_the_same_outputs_at_every_shape(model_type: str, batch: int, length: int) -> None:
    made = analysed(model_type)
    generator = torch.Generator().manual_seed(4)
    feed = {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}
    feed["attention_mask"] = torch.ones_like(feed["input_ids"])
    if length > 5:
        feed["attention_mask"][-1, 9:] = 0
    if "token_type_ids" in made.prepared.inputs:
        feed["token_type_ids"] = (feed["input_ids"] > 200).long()
    with torch.no_grad():
        expected = made.model(**feed)
        found = made.graph.module(**{name: feed[name] for name in feed if name in made.prepared.inputs})
    assert set(found.keys()) == set(expected.keys())
    assert relative_error(found, expected) < TOLERANCE


# Parameters with two axes that multiply nothing: biases of experts, and relative positions, which are an input.
NO_FACTORS = ("_bias", "rel_embeddings.weight")


@pytest.mark.parametrize("model_type", EVERY)
def test_every_weight_is_a_site(model_type: str) -> None:
    made = analysed(model_type)
    parameters = made.model.named_parameters()
    wanted = {storage_key(p): p.nbytes for name, p in parameters if p.dim() >= 2 and not name.endswith(NO_FACTORS)}
    found = {}
    for site in made.graph.sites:
        weight = attribute(made.graph.module, site.weight)
        if isinstance(weight, torch.nn.Parameter):
            found[storage_key(weight)] = weight.nbytes
    assert sum(found.values()) == sum(wanted.values())
    assert made.graph.leftovers == {}


@pytest.mark.parametrize("model_type", EVERY)
def test_sites_are_named_once_and_grouped_by_input(model_type: str) -> None:
    sites = analysed(model_type).graph.sites
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        same = [other for other in sites if other.input_group == site.input_group and other.kind == site.kind]
        assert {input_value(other) for other in same} == {input_value(site)}


SPLIT = {"attn.q": 2, "attn.k": 2, "attn.v": 2, "attn.o": 2}
FUSED = {"attn.qkv": 2, "attn.o": 2}
GATED = {"mlp.gate": 2, "mlp.up": 2, "mlp.down": 2}
FUSED_GATED = {"mlp.gate_up": 2, "mlp.down": 2}
PLAIN = {"mlp.up": 2, "mlp.down": 2}
ENDS = {"embed": 1, "head": 1}
EXPERTS = {"router": 2, "expert": 4}
# The first layer has no experts; beside those of the second stands one that every row takes.
LATER_EXPERTS = {"router": 1, "expert": 2} | GATED
# Queries, keys and values of low rank: what the graph multiplies is in no site's result as it is.
LOW_RANK = {"attn.o": 2}

ROLES = {
    "llama": SPLIT | GATED | ENDS, "qwen2": SPLIT | GATED | ENDS, "qwen3": SPLIT | GATED | ENDS,
    "mistral": SPLIT | GATED | ENDS, "gemma2": SPLIT | GATED | ENDS, "gemma3_text": SPLIT | GATED | ENDS,
    "phi3": FUSED | FUSED_GATED | ENDS, "gpt2": FUSED | PLAIN | ENDS, "gpt_neox": FUSED | PLAIN | ENDS,
    "opt": SPLIT | PLAIN | ENDS, "bloom": FUSED | PLAIN | ENDS, "falcon": FUSED | PLAIN | ENDS,
    "bert": SPLIT | PLAIN | {"embed": 1}, "roberta": SPLIT | PLAIN | {"embed": 1},
    "distilbert": SPLIT | PLAIN | {"embed": 1}, "modernbert": FUSED | FUSED_GATED | {"embed": 1},
    "starcoder2": SPLIT | PLAIN | ENDS, "olmo2": SPLIT | GATED | ENDS, "cohere": SPLIT | GATED | ENDS,
    "stablelm": SPLIT | GATED | ENDS, "granite": SPLIT | GATED | ENDS, "smollm3": SPLIT | GATED | ENDS,
    "phi": SPLIT | PLAIN | ENDS, "gemma": SPLIT | GATED | ENDS, "gptj": SPLIT | PLAIN | ENDS,
    "codegen": FUSED | PLAIN | ENDS, "gpt_neo": SPLIT | PLAIN | ENDS, "gpt_bigcode": FUSED | PLAIN | ENDS,
    "mpt": FUSED | PLAIN | ENDS, "falcon_alibi": FUSED | PLAIN | ENDS, "falcon_grouped": FUSED | PLAIN | ENDS,
    "gpt_oss": SPLIT | EXPERTS | ENDS, "mixtral": SPLIT | EXPERTS | ENDS, "qwen2_moe": SPLIT | GATED | EXPERTS | ENDS,
    "qwen3_moe": SPLIT | EXPERTS | ENDS, "olmoe": SPLIT | EXPERTS | ENDS, "granitemoe": SPLIT | EXPERTS | ENDS,
    "phimoe": SPLIT | {"expert": 4} | ENDS, "glm4_moe": SPLIT | LATER_EXPERTS | ENDS,
    "ernie4_5_moe": SPLIT | LATER_EXPERTS | ENDS, "deepseek_v2": LOW_RANK | LATER_EXPERTS | ENDS,
    "deepseek_v3": LOW_RANK | LATER_EXPERTS | ENDS,
    "jetmoe": {"router": 4} | ENDS,  # its graph has a product for each expert's matrix
    "xglm": SPLIT | PLAIN | ENDS,
    "electra": SPLIT | PLAIN | {"embed": 1}, "albert": SPLIT | PLAIN | {"embed": 1},
    "mpnet": SPLIT | PLAIN | {"embed": 1}, "deberta-v2": SPLIT | PLAIN | {"embed": 1},
    "camembert": SPLIT | PLAIN | {"embed": 1}, "xlm-roberta": SPLIT | PLAIN | {"embed": 1},
    "t5_encoder": SPLIT | PLAIN | {"embed": 1}, "bert_classifier": SPLIT | PLAIN | ENDS,
    "bert_masked_lm": SPLIT | PLAIN | ENDS, "distilbert_classifier": SPLIT | PLAIN | ENDS,
    "modernbert_classifier": FUSED | FUSED_GATED | ENDS,
}  # fmt: skip


@pytest.mark.parametrize("model_type", EVERY)
def test_roles(model_type: str) -> None:
    sites = analysed(model_type).graph.sites
    assert Counter(site.role for site in sites if site.role is not None) == ROLES[model_type]


def test_roles_fall_on_the_right_sites() -> None:
    roles = {site.name.removeprefix("model.layers.1."): site.role for site in analysed("llama").graph.sites}
    expected = {
        "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
        "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down", "model.embed_tokens": "embed", "lm_head": "head",
    }  # fmt: skip
    assert expected.items() <= roles.items()


def test_a_tied_head_is_one_group_with_its_embedding() -> None:
    ties = {site.name: site.tie_group for site in analysed("gpt2").graph.sites if site.tie_group is not None}
    assert ties.keys() == {"transformer.wte", "lm_head"} and len(set(ties.values())) == 1
    assert all(site.tie_group is None for site in analysed("llama").graph.sites)


def test_position_and_type_embeddings_are_sites_without_a_role() -> None:
    roles = {site.name: site.role for site in analysed("bert").graph.sites if site.kind == "embedding"}
    assert roles == {
        "embeddings.word_embeddings": "embed",
        "embeddings.token_type_embeddings": None,
        "embeddings.position_embeddings": None,
    }
