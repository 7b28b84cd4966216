"""Folds found on real architectures: the function is the same in float64, whatever the factors."""

from __future__ import annotations

import pytest
import torch

from qcompiler.graph.text import graph_text
from qcompiler.passes.analyse.folds import apply_fold, find_folds
from tests import models
from tests.captures import analysed
from tests.passes.folded import apply_all, largest_error, of_model, outputs

# What two layers must have: kind -> how many.
EXPECTED = {
    "llama": {"norm-linear": 5, "value-output": 2, "up-down": 2},
    "gpt2": {"norm-linear": 4, "value-output": 2},
    "opt": {"norm-linear": 4, "value-output": 2, "relu": 2},
    "gemma2": {"norm-linear": 4, "value-output": 2, "up-down": 2},
    "falcon": {"norm-linear": 2, "value-output": 2},
    "qwen3": {"norm-linear": 5, "value-output": 2, "up-down": 2},
    "phi3": {"norm-linear": 5, "value-output": 2, "up-down": 2},
    "bert": {"value-output": 2},
    "mixtral": {"norm-linear": 5, "value-output": 2},
}


def kinds(folds) -> dict[str, int]:
    names = [fold.kind for fold in folds]
    return {kind: names.count(kind) for kind in dict.fromkeys(names)}


def preserves(model_type: str) -> dict[str, int]:
    for adversarial in (False, True):
        graph = of_model(model_type)
        folds, refusals = find_folds(graph)
        linears = {site.name for site in graph.sites if site.kind != "embedding"}
        assert {name for fold in folds for name in fold.sites} | {r.site for r in refusals} == linears
        before, text = outputs(graph, model_type), graph_text(graph.module)
        apply_all(graph, folds, adversarial)
        assert graph_text(graph.module) == text
        assert largest_error(outputs(graph, model_type), before) < 1e-9
    return kinds(folds)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_function_is_preserved(model_type: str) -> None:
    assert preserves(model_type) == EXPECTED[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in (*models.ALWAYS, *models.EXHAUSTIVE) if name not in EXPECTED])
def test_the_function_of_every_architecture_is_preserved(model_type: str) -> None:
    preserves(model_type)


def test_factors_of_one_change_no_bit() -> None:
    for model_type in ("llama", "gemma2", "opt"):
        graph = of_model(model_type)
        before = {name: tensor.clone() for name, tensor in graph.module.named_parameters()}
        for fold in find_folds(graph)[0]:
            apply_fold(graph, fold, torch.ones(fold.channels))
        graph.materialise()
        assert all(torch.equal(before[name], tensor) for name, tensor in graph.module.named_parameters())


def test_every_head_that_shares_a_value_head_shares_its_factors() -> None:
    graph = of_model("llama")
    config = analysed("llama").model.config
    kv, heads, width = config.num_key_value_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    (fold,) = [f for f in find_folds(graph)[0] if f.name == "model.layers.0.self_attn.v_proj"]
    assert fold.channels == kv * width
    assert fold.divided[0].channels.tolist() == list(range(kv * width))
    columns = torch.arange(kv * width).reshape(kv, 1, width).expand(kv, heads // kv, width).reshape(-1)
    assert torch.equal(fold.multiplied[0].channels, columns)


def test_only_the_rows_of_values_and_of_up_of_a_fused_weight_are_divided() -> None:
    folds = {fold.name.rpartition(".")[2]: fold for fold in find_folds(of_model("phi3"))[0]}
    qkv, gate_up = (folds[name].divided[0].channels for name in ("qkv_proj", "gate_up_proj"))
    assert qkv.tolist() == [-1] * (256 + 128) + list(range(128))
    assert gate_up.tolist() == [-1] * 512 + list(range(512))


def test_a_norm_before_two_branches_takes_the_union_of_their_readers() -> None:
    (fold, *_) = find_folds(of_model("falcon"))[0]
    assert fold.sites == ["transformer.h.0.self_attention.query_key_value", "transformer.h.0.mlp.dense_h_to_4h"]


def test_a_norm_before_experts_scales_the_router_and_every_expert() -> None:
    folds = {fold.name: fold for fold in find_folds(of_model("mixtral"))[0]}
    experts = folds["model.layers.0.post_attention_layernorm.weight"].multiplied
    assert [weight.name for weight in experts] == [
        "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.gate_up_proj.weight"
    ]  # fmt: skip


def test_a_gain_of_one_plus_the_weight_is_divided_as_a_whole() -> None:
    graph = of_model("gemma2")
    fold = find_folds(graph)[0][0]
    (gain,) = fold.divided
    assert gain.offset == 1.0
    old = graph.constant(gain.name).clone()
    apply_fold(graph, fold, torch.full((fold.channels,), 4.0))
    assert torch.allclose(graph.constant(gain.name), (1 + old) / 4 - 1, rtol=0, atol=1e-15)


def test_applied_again_they_add_up() -> None:
    graph = of_model("opt")
    before = outputs(graph, "opt")
    for _ in range(2):
        for fold in find_folds(graph)[0]:
            apply_fold(graph, fold, torch.linspace(0.1, 3, fold.channels))
    graph.materialise()
    assert largest_error(outputs(graph, "opt"), before) < 1e-9


def test_norms_of_queries_and_keys_are_left_alone() -> None:
    assert not [fold for fold in find_folds(of_model("qwen3"))[0] if "q_norm" in fold.name or "k_norm" in fold.name]


def test_a_norm_that_also_feeds_the_residual_is_refused() -> None:
    reasons = {refusal.site: refusal for refusal in find_folds(of_model("bert"))[1]}
    query = reasons["encoder.layer.0.attention.self.query"]
    assert query.producer == "embeddings.LayerNorm.weight"
    assert "residual" in query.reason and "encoder.layer.0.attention.output" in query.reason
    assert "output of the model" in reasons["pooler.dense"].reason
    assert "gelu" in reasons["encoder.layer.0.output.dense"].reason


def test_a_tied_head_is_refused() -> None:
    (refusal,) = [r for r in find_folds(of_model("opt"))[1] if r.site == "lm_head"]
    assert "read in 2 places" in refusal.reason and "embed_tokens" in refusal.reason


def test_rows_of_experts_are_not_scaled_on_their_own() -> None:
    (refusal, *_) = [r for r in find_folds(of_model("mixtral"))[1] if r.site.endswith("down_proj")]
    assert "experts" in refusal.reason and "cannot be scaled" in refusal.reason


@pytest.mark.parametrize(
    "s, message",
    [(torch.ones(3), "expected 256 factors"), (torch.zeros(256), "positive"), (torch.full((256,), torch.inf), "finite")],
)
def test_impossible_factors_are_refused(s: torch.Tensor, message: str) -> None:
    graph = of_model("llama")
    with pytest.raises(ValueError, match=message):
        apply_fold(graph, find_folds(graph)[0][0], s)
