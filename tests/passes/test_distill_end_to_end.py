"""End-to-end distillation: the divergence from the float model falls on windows that no step saw, or nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from qcompiler.errors import CapacityError, UsageError
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops import layout
from qcompiler.passes.analyse.gains import gains
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.distill_end_to_end import DistillEndToEnd
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select
from tests.calibrated import batches, calibrated
from tests.captures import Analysed, analysed
from tests.sweep.prepared_context import context_of

W2A8 = {"bits": 2, "group": 32, "symmetric": False, "activations": "int8-block128"}
VQ2 = {"vq": "vq2d16-b16x128-g128", "activations": "int8-block128"}
QUICK = {"steps": 6, "batch": 2, "checks": 2, "scale_rate": 0.004}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    """A captured model whose gains are put back."""
    model = analysed(getattr(request, "param", "llama"))
    held = {name: model.graph.stored(name) for name in gains(model.graph)}
    yield model
    for name, tensor in held.items():
        model.graph.set_constant(name, tensor)


def _solved(model: Analysed, linear: dict[str, Any] = W2A8, samples: int = 8, **more: Any) -> Any:
    context = context_of(model, linear, samples=samples, length=16, **more)
    if "vq" in linear:
        generator = torch.Generator().manual_seed(0)
        for site in model.graph.sites:
            if site.name in context.schemes and site.kind == "linear" and site.role != "head":
                context.solutions[site.name] = _roughly(model.graph.constant(site.weight), context, site.name, generator)
    RoundToNearest().run(model.graph, context)
    return context


def _roughly(weight: torch.Tensor, context: Any, name: str, generator: torch.Generator) -> VqWeight:
    """Codebooks of randomly drawn vectors, each vector's nearest entry."""
    f = context.schemes[name].weight_format
    n, k = weight.shape
    down, across = f.blocks(n, k)
    books = torch.randint(-120, 121, (down, across, f.centroids, f.dim), generator=generator).to(torch.int8)
    scales = weight.reshape(n, -1, f.group).abs().amax(dim=2)
    vectors = (weight / scales.repeat_interleave(f.group, dim=1) * 127).view(n, k // f.span, f.dim, 4).transpose(2, 3)
    vectors = vectors.reshape(n, -1, f.dim)
    rows = torch.arange(n) // f.block_rows
    columns = torch.arange(vectors.shape[1]) // 4 * f.span // f.block_columns
    distance = (vectors[:, :, None] - books.float()[rows][:, columns]).square().sum(dim=-1)
    indices = distance.argmin(dim=2).to(torch.uint8)
    return VqWeight(indices, books, torch.full((down, across), 1 / 127).half(), scales.half(), k, f)


def _kl(model: Analysed, context: Any, sample: dict[str, Any]) -> float:
    """KL(float ‖ dequantized) of one window, from the module with its weights replaced; activations in float."""
    ids = sample["input_ids"]
    with torch.no_grad():
        reference = model.model(input_ids=ids).logits.log_softmax(-1)
        modules = dict(model.model.named_modules())
        given = {
            f"{name}.weight": solution.dequantize() for name, solution in context.solutions.items() if name in modules
        }
        own = torch.func.functional_call(model.model, given, (), {"input_ids": ids}).logits.log_softmax(-1)
    return float(functional.kl_div(own, reference, reduction="sum", log_target=True)) / ids.shape[1]


@pytest.mark.parametrize("linear", [W2A8, VQ2], ids=["affine", "vq"])
def test_the_divergence_falls_on_windows_that_no_step_saw(model: Analysed, linear: dict[str, Any]):
    context = _solved(model, linear)
    before = dict(context.solutions)
    report = DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, context)
    notes = report.notes
    assert not report.fallbacks and notes["kept"] and notes["held_out_after"] < notes["held_out_before"]
    assert notes["measure"] == "KL (nats a token)" and notes["windows"] == 7 and notes["held_out_windows"] == 1
    assert report.changed == report.matched == 14 and set(report.layers) == set(before) - {"model.embed_tokens", "lm_head"}
    for name, layer in report.layers.items():
        held, now = before[name], context.solutions[name]
        assert layer["distilled"] and (now.scales != held.scales).any() and now.format == held.format
        if isinstance(held, VqWeight):
            assert torch.equal(now.indices, held.indices) and (now.codebooks != held.codebooks).any()
        else:
            assert torch.equal(now.codes, held.codes) and torch.equal(now.zeros, held.zeros)


def test_the_held_out_divergence_is_that_of_the_model(model: Analysed):
    context = _solved(model, {**W2A8, "activations": "float"}, head="float", embed="float", allow={"min_coverage": 0})
    expected = _kl(model, context, list(context.samples())[-1])
    report = DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, context)
    assert report.notes["held_out_before"] == pytest.approx(expected, rel=1e-3)
    assert report.notes["held_out_after"] == pytest.approx(_kl(model, context, list(context.samples())[-1]), rel=1e-3)


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_without_logits_the_error_of_the_outputs_falls(model: Analysed):
    report = DistillEndToEnd(**QUICK).run(model.graph, _solved(model))
    assert report.notes["measure"] == "relative squared error" and report.notes["gains"] == 5
    assert report.notes["held_out_after"] < report.notes["held_out_before"]


@pytest.mark.parametrize("model", ["gemma2"], indirect=True)
def test_gains_of_norms_are_tuned_and_those_alone(model: Analysed):
    names = gains(model.graph)
    assert len(names) == 9 and all(name.endswith("norm.weight") for name in names)
    before = {str(node.target): model.graph.stored(str(node.target)) for node in model.graph.nodes if node.op == "get_attr"}
    report = DistillEndToEnd(**QUICK, gain_rate=0.01).run(model.graph, _solved(model))
    assert report.notes["kept"] and report.notes["gains"] == 9
    changed = {name for name, tensor in before.items() if not torch.equal(model.graph.stored(name), tensor)}
    assert changed == set(names)


@pytest.mark.parametrize("model", ["gemma2"], indirect=True)
def test_a_head_and_the_lookups_of_its_weight_are_tuned_as_one(model: Analysed):
    low = {**W2A8, "group": 64}
    context = _solved(model, head=low, embed={**low, "activations": "float"})
    head = next(site for site in model.graph.sites if site.role == "head")
    lookup = next(site for site in model.graph.sites if site.kind == "embedding")
    assert head.tie_group is not None and head.tie_group == lookup.tie_group
    before = context.solutions[head.name]
    alone = DistillEndToEnd(**QUICK, select=Select(name="*.0.mlp.*")).run(model.graph, context)
    assert alone.notes["kept"] and context.solutions[head.name] is before
    report = DistillEndToEnd(**QUICK, head=True).run(model.graph, context)
    assert report.notes["kept"] and head.name in report.layers and lookup.name not in report.layers
    assert context.solutions[lookup.name] is context.solutions[head.name]
    assert (context.solutions[head.name].scales != before.scales).any()


def test_what_does_not_get_better_changes_nothing(model: Analysed):
    context = _solved(model, samples=4)
    before, norms = dict(context.solutions), {name: model.graph.stored(name) for name in gains(model.graph)}
    report = DistillEndToEnd(steps=2, batch=1, checks=1, scale_rate=5.0).run(model.graph, context)
    assert not report.notes["kept"] and report.changed == 0 and report.notes["held_out_after"] == report.notes["held_out_before"]
    assert [skip.node for skip in report.fallbacks] == ["model"]
    assert "no better, everything is left as it was" in report.fallbacks[0].reason
    assert all(context.solutions[name] is solution for name, solution in before.items())
    assert all(model.graph.stored(name) is tensor for name, tensor in norms.items())


def test_equal_seeds_give_equal_weights(model: Analysed, tmp_path: Path):
    found = []
    for folder in (None, tmp_path):
        context = _solved(model, VQ2)
        context.scratch = context.solutions.folder = folder
        DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, context)
        found.append(dict(context.solutions))
    for name, solution in found[0].items():
        twin = found[1][name]
        assert torch.equal(solution.scales, twin.scales)
        if isinstance(solution, VqWeight):
            assert torch.equal(solution.codebooks, twin.codebooks)
    context = _solved(model, VQ2)
    DistillEndToEnd(**QUICK, gain_rate=0, seed=1).run(model.graph, context)
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(context.solutions[name].codebooks, found[0][name].codebooks)


def test_a_budget_that_fits_changes_nothing_and_one_that_does_not_is_refused(model: Analysed, tmp_path: Path):
    free = _solved(model)
    DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, free)
    tight = _solved(model)
    tight.memory = 1000
    with pytest.raises(CapacityError, match="of 1,000 bytes is too small: gradients of one window .* take [0-9,]+;") as error:
        DistillEndToEnd(**QUICK).run(model.graph, tight)
    tight.memory = int(str(error.value).partition(" take ")[2].partition(";")[0].replace(",", ""))
    for scratch in (None, tmp_path):
        tight.scratch = scratch
        DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, tight)
        assert all(torch.equal(s.scales, tight.solutions[name].scales) for name, s in free.solutions.items())
        tight.solutions = _solved(model).solutions


@pytest.mark.parametrize("model", ["mixtral"], indirect=True)
def test_experts_stay_as_they_are_and_are_named(model: Analysed):
    context = _solved(model)
    report = DistillEndToEnd(**QUICK, gain_rate=0).run(model.graph, context)
    experts = [skip for skip in report.skipped if "a matrix for each expert" in skip.reason]
    assert len(experts) == 4 and report.notes["kept"]


def test_the_result_goes_into_the_graph():
    graph, context = calibrated({"bits": 2, "group": 32, "symmetric": False}, samples=batches(8))
    RoundToNearest().run(graph, context)
    PassManager(Trace()).run(graph, context, [DistillEndToEnd(**QUICK)])
    scales = {name: solution.scales for name, solution in context.solutions.items()}
    QuantizeSites().run(graph, context)
    stored = {name: tensor for name, tensor in graph.module.named_buffers() if name.endswith(".scales")}
    assert len(stored) == len(scales) == 7
    for name, tensor in scales.items():
        assert torch.equal(stored[f"{name}.scales"], torch.from_numpy(layout.pack_scales(tensor.numpy())))


def test_what_cannot_be_done_is_refused(model: Analysed):
    with pytest.raises(UsageError, match="expected at least 2, one is held out"):
        DistillEndToEnd().run(model.graph, _solved(model, samples=1))
    context = _solved(model)
    context.samples = tuple
    with pytest.raises(UsageError, match="needs calibration samples"):
        DistillEndToEnd().run(model.graph, context)
    unsolved = context_of(model, W2A8)
    assert DistillEndToEnd().run(model.graph, unsolved).matched == 0
    for options in ({"steps": 0}, {"scale_rate": -1.0}, {"hold_out": 1.0}, {"warm_up": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DistillEndToEnd(**options)
