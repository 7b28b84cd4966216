"""GPTQ as a pass: every layer better on its inputs than rounded, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qcompiler.errors import GateError, InputError, UsageError
from qcompiler.numerics import affine
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.passes.transform.smooth_quant import SmoothQuant
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Allow, Select
from qcompiler.sweep import Sweep
from tests.captures import analysed
from tests.sweep.prepared_context import context_of, linear_sites


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_layers_lose_less_than_rounded_ones(model_type: str, asymmetric: bool):
    model = analysed(model_type)
    context = context_of(model, {"bits": 3, "group": 64}, samples=24, length=16)
    report = Gptq(asymmetric=asymmetric).run(model.graph, context)
    assert report.changed == report.matched == len(linear_sites(model))
    assert not report.fallbacks
    for name, layer in report.layers.items():
        assert layer["method"] == "gptq" and layer["tokens"] == 24 * (1 if "pooler" in name else 16)
        assert layer["error_after"] < layer["error_before"], name
    assert {skip.reason for skip in report.skipped} <= {"the head; name it to have it solved"}


def test_the_error_of_asymmetric_calibration_is_that_of_the_outputs():
    """E‖W̃ x − W x̃‖² / tr(W H Wᵀ), from the two streams' inputs as they are."""
    model = analysed("llama")
    context = context_of(model, {"bits": 3, "group": 64}, samples=12, length=16)
    report = Gptq(asymmetric=True).run(model.graph, context)
    site = model.graph.site("model.layers.0.self_attn.o_proj")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for segment in Sweep(model.graph, context, linear_sites(model), float_stream=True):
        for wave in segment.waves:
            segment.feed({group.node: lambda x, y: seen.append((x, y)) for group in wave.groups if site in group.sites})
    x, x_float = (torch.cat(parts) for parts in zip(*seen, strict=True))
    weight = model.graph.constant(site.weight)
    error = (x @ context.solutions[site.name].dequantize().T - x_float @ weight.T).square().sum()
    assert report.layers[site.name]["error_after"] == pytest.approx(float(error / (x @ weight.T).square().sum()), rel=1e-3)


def test_layers_with_more_inputs_than_tokens_are_named():
    model = analysed("llama")
    context = context_of(model, {"bits": 3, "group": 64}, samples=24, length=16)  # 384 tokens
    warnings: list[str] = []
    context.reporter.warning = warnings.append  # type: ignore[method-assign]
    report = Gptq(passes=1).run(model.graph, context)
    few = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert report.notes["layers_with_few_tokens"] == few
    assert [few[0] in warning and "512 inputs, 384 tokens" in warning for warning in warnings] == [True]


def test_every_expert_is_solved_on_its_own_rows():
    model = analysed("mixtral")
    context = context_of(model, {"bits": 3, "group": 64}, samples=8, length=16)
    report = Gptq().run(model.graph, context)
    experts = [site for site in model.graph.sites if site.kind == "experts"]
    assert experts and not report.fallbacks
    for site in experts:
        layer = report.layers[site.name]
        assert layer["error_after"] < layer["error_before"]
        assert layer["experts_missed"] == []
        assert context.solutions[site.name].codes.shape == site.weight_shape


def test_an_expert_that_no_token_meets_is_rounded_and_named():
    model = analysed("mixtral")
    context = context_of(model, {"bits": 3, "group": 64}, samples=1, length=2)
    warnings: list[str] = []
    context.reporter.warning = warnings.append  # type: ignore[method-assign]
    report = Gptq().run(model.graph, context)
    missed = {name: layer["experts_missed"] for name, layer in report.layers.items() if layer.get("experts_missed")}
    assert missed
    name, (first, *_) = next(iter(missed.items()))
    assert any(name in warning and "no calibration token meets expert" in warning for warning in warnings)
    weight = dict(model.graph.matrices(model.graph.site(name)))[first]
    rounded = affine.fit(weight, context.schemes[name].weight_format)
    assert torch.equal(context.solutions[name].codes[first], rounded.codes)


def test_what_is_named_is_solved_and_nothing_else():
    model = analysed("llama")
    context = context_of(model)
    report = Gptq(select=Select(role="head")).run(model.graph, context)
    head = next(site for site in model.graph.sites if site.role == "head")
    assert list(report.layers) == [head.name] == list(context.solutions)
    assert ("model.layers.0.self_attn.q_proj", "not selected") in [(s.node, s.reason) for s in report.skipped]


def test_a_selector_that_names_nothing_lists_the_nearest():
    model = analysed("llama")
    with pytest.raises(UsageError, match=r"names no layer; nearest: .*down_proj.*roles here: .*mlp\.down"):
        Gptq(select=Select(name="*.mlp.down_prj")).run(model.graph, context_of(model))
    with pytest.raises(UsageError, match=r"round_to_nearest: .*names no layer"):
        RoundToNearest(select=Select(role="attn.x")).run(model.graph, context_of(model))


def test_a_selector_may_name_nothing_where_the_recipe_allows_it():
    model = analysed("llama")
    context = context_of(model)
    context.recipe = dataclasses.replace(context.recipe, allow=Allow(unmatched=("gptq", "smooth_quant")))
    steps = [SmoothQuant(select=Select(name="x")), Gptq(select=Select(role="attn.qkv"))]
    PassManager(Trace()).run(model.graph, context, steps)
    assert not context.solutions
    for step in steps:  # each by itself, whatever it does with its selection
        with pytest.raises(UsageError, match=rf"{step.name}: .*names no layer; nearest: .*unmatched: \[{step.name}\]"):
            PassManager(Trace()).run(model.graph, context_of(model), [step])


def test_a_pass_that_finds_everything_solved_fails_by_name():
    model = analysed("llama")
    context = context_of(model)
    RoundToNearest().run(model.graph, context)
    with pytest.raises(GateError, match="(?s)gptq matched nothing.*solved already"):
        PassManager(Trace()).run(model.graph, context, [Gptq()])


def test_an_unsolved_layer_is_not_left_in_float():
    model = analysed("llama")
    context = context_of(model)
    Gptq().run(model.graph, context)
    with pytest.raises(GateError, match="no pass of the recipe solved .*embed_tokens.*end its passes with round_to_nearest"):
        QuantizeSites().run(model.graph, context)


def test_a_hessian_that_no_damping_saves_falls_back_by_name(monkeypatch: pytest.MonkeyPatch):
    from qcompiler.numerics import gptq as solver
    from qcompiler.numerics.damping import NotFactored

    model = analysed("llama")
    context = context_of(model)
    refused = NotFactored(damping=1.0, attempts=4, reason="no damping up to 1 gives a factor")
    monkeypatch.setattr(solver, "factorise", lambda *_: refused)
    report = Gptq().run(model.graph, context)
    assert len(report.fallbacks) == len(linear_sites(model))
    assert report.fallbacks[0].node == "model.layers.0.self_attn.q_proj"
    with pytest.raises(GateError, match="fallbacks, 0 allowed:\n  model.layers.0.self_attn.q_proj: no damping up to 1"):
        PassManager(Trace()).run(model.graph, context_of(model), [Gptq()])


def test_an_order_that_would_scatter_groups_is_refused():
    model = analysed("llama")
    with pytest.raises(UsageError, match="q_proj has groups, and ordering 'activation' with live groups would scatter"):
        Gptq(ordering="activation", groups="live").run(model.graph, context_of(model))
    Gptq(ordering="activation", groups="static", select=Select(role="attn.q")).run(model.graph, context_of(model))
    Gptq(ordering="group_aware", groups="live", select=Select(role="attn.q")).run(model.graph, context_of(model))


def test_an_activation_that_is_no_number_names_layer_and_sample():
    model = analysed("llama")
    context = context_of(model)
    feeds = list(context.samples())
    name = next(s.weight for s in model.graph.sites if s.role == "embed")
    weight = model.graph.stored(name)
    token = int(feeds[1]["input_ids"][0, 3])
    held = weight.data[token].clone()
    broken = dataclasses.replace(context, samples=lambda: feeds)
    try:
        weight.data[token] = float("nan")
        with pytest.raises(InputError, match=r"layer model.layers.0.self_attn.q_proj.*NaN in calibration sample 1"):
            Gptq().run(model.graph, broken)
    finally:
        weight.data[token] = held
    assert torch.isfinite(weight).all()
