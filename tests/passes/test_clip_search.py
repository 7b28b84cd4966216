"""Clip search as a pass: the statistics of the layer's own inputs, solved predecessors quantized, reasons for the rest."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import GateError
from qcompiler.numerics import affine
from qcompiler.numerics.clipping import BlockHessian, fit_clipped
from qcompiler.ops.formats import AffineFormat
from qcompiler.passes.solve.clip_search import ClipSearch
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Skip
from qcompiler.pipeline.trace import Trace
from tests.calibrated import batches, block, calibrated, inputs_of

INT3 = {"bits": 3, "group": 32, "activations": "float"}


def moments(x: torch.Tensor, width: int) -> torch.Tensor:
    reducer = BlockHessian(x.shape[1], width)
    reducer.update(x)
    return reducer.result()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_first_wave_is_solved_on_the_models_inputs(symmetric):
    graph, context = calibrated({**INT3, "symmetric": symmetric})
    report = ClipSearch().run(graph, context)
    assert report.matched == report.changed == 7 and not report.fallbacks
    model = block()
    for name in ("q", "k", "v"):
        weight = model.get_submodule(name).weight.detach()
        expected = fit_clipped(weight, AffineFormat(3, 32, symmetric), moments(torch.cat(batches()), 32))
        # sums in another order may turn a near tie
        same = (context.solutions[name].codes == expected.weight.codes).float().mean()
        assert same > 0.98
        record = report.layers[name]
        assert record["error_before"] == pytest.approx(expected.error_before / expected.signal, rel=1e-3)
        assert record["error_after"] == pytest.approx(expected.error_after / expected.signal, rel=1e-3)
        assert record["method"] == "clip_search" and record["tokens"] == 128 and 0 < record["clipped_share"] <= 1
    assert all(layer["error_after"] <= layer["error_before"] for layer in report.layers.values())


def test_later_waves_see_quantized_predecessors():
    """o's statistics are those of what quantized q, k and v make of the samples, not of the float model's."""
    graph, context = calibrated({**INT3, "bits": 2})
    report = ClipSearch().run(graph, context)
    model = block()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            model.get_submodule(name).weight.copy_(context.solutions[name].dequantize())
    weight, format = model.o.weight.detach(), AffineFormat(2, 32)
    quantized = fit_clipped(weight, format, moments(inputs_of(model, batches())["o"], 32))
    float_ = fit_clipped(weight, format, moments(inputs_of(block(), batches())["o"], 32))
    assert report.layers["o"]["error_after"] == pytest.approx(quantized.error_after / quantized.signal, rel=5e-4)
    assert report.layers["o"]["error_after"] != pytest.approx(float_.error_after / float_.signal, rel=2e-3)


def test_the_models_output_is_nearer_than_after_plain_rounding():
    outputs = {}
    for step in (ClipSearch(), ClipSearch(error="diagonal"), RoundToNearest(clipping="minmax")):
        graph, context = calibrated(INT3)
        step.run(graph, context)
        model = block()
        with torch.no_grad():
            for name, solution in context.solutions.items():
                model.get_submodule(name).weight.copy_(solution.dequantize())
            held_out = torch.cat(batches(seed=7))
            outputs[getattr(step, "error", "minmax")] = (model(held_out) - block()(held_out)).square().mean().item()
    assert outputs["output"] < outputs["minmax"] and outputs["diagonal"] < outputs["minmax"]


def test_the_diagonal_is_the_importance_of_the_grid_fit():
    graph, context = calibrated(INT3)
    report = ClipSearch(error="diagonal").run(graph, context)
    importance = torch.cat(batches()).square().mean(dim=0)
    expected = affine.fit(block().q.weight.detach(), AffineFormat(3, 32), importance=importance)
    assert (context.solutions["q"].codes == expected.codes).float().mean() > 0.98
    assert report.layers["q"]["clipping"] == "diagonal" and "error_after" not in report.layers["q"]


def test_sites_that_no_token_reaches_are_fallbacks():
    graph, context = calibrated(INT3, samples=[torch.zeros(4, 96)])
    report = ClipSearch().run(graph, context)
    assert [skip.node for skip in report.fallbacks][:3] == ["q", "k", "v"]
    assert "no calibration token reached it" in report.fallbacks[0].reason
    identity = torch.eye(32).expand(3, 32, 32)
    expected = fit_clipped(block().q.weight.detach(), AffineFormat(3, 32), identity).weight
    assert torch.equal(context.solutions["q"].codes, expected.codes)


def test_what_is_left_to_the_next_pass_and_why():
    overrides = [
        {"select": {"name": "q"}, "scheme": "float"},
        {"select": {"name": "k"}, "scheme": {"bits": 8, "group": "tensor"}},
    ]
    graph, context = calibrated(INT3, overrides=overrides)
    report = ClipSearch().run(graph, context)
    assert report.skipped == [
        Skip("q", "the recipe keeps it in float"),
        Skip("k", "one scale for the whole matrix; the search is for scales of groups and rows"),
    ]
    assert "k" not in context.solutions and report.matched == 5
    assert RoundToNearest().run(graph, context).matched == 1
    with pytest.raises(GateError, match="(?s)clip_search matched nothing.*v: solved already"):
        PassManager(Trace()).run(graph, context, [ClipSearch()])
