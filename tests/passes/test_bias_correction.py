"""Bias correction: the mean error of every product is gone where it was measured, and the output nearer where it was not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qcompiler.errors import GateError
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.passes.observe.calibrate_ranges import CalibrateRanges
from qcompiler.passes.observe.place_observers import PlaceObservers
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.bias_correction import BiasCorrection, OutputError
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Skip
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep
from tests.calibrated import WIDTH, batches, block, calibrated

STATIC = {"bits": 8, "activations": "int8-static"}


def solved(linear=STATIC, percentile=99.0, **given):
    graph, context = calibrated(linear, **given)
    RoundToNearest().run(graph, context)
    if linear["activations"] == "int8-static":
        PlaceObservers().run(graph, context)
        CalibrateRanges(method="percentile", percentile=percentile).run(graph, context)
    return graph, context


def results(graph, context) -> dict[str, torch.Tensor]:
    """What every site gives for the calibration samples, in one stream."""
    given = {}
    for segment in Sweep(graph, context, graph.sites):
        nodes = {site.name: site.node for wave in segment.waves for site in wave.sites}
        found = [segment.run(sample, list(nodes.values())) for sample in range(segment.samples)]
        given |= {name: torch.cat([values[node] for values in found]) for name, node in nodes.items()}
    return given


def mean_errors(graph, context, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (expected[name] - y).double().mean(dim=0) for name, y in results(graph, context).items()}


@pytest.mark.parametrize("linear", [STATIC, {"bits": 3, "group": 32, "activations": "int8-token"}], ids=["static", "int3"])
def test_mean_errors_are_gone_on_the_calibration_set(linear):
    graph, context = solved(linear)
    expected = results(*calibrated(linear))  # nothing is solved there: the float model
    before = mean_errors(graph, context, expected)
    report = BiasCorrection().run(graph, context)
    after = mean_errors(graph, context, expected)
    verify(graph, "analysed")
    assert report.matched == report.changed == 7
    for name, error in after.items():
        assert error.abs().max() < 1e-3 * before[name].abs().max()
        assert report.layers[name]["mean_error_after"] <= 1e-6 * report.layers[name]["mean_error_before"] + 1e-9
        assert report.layers[name]["output_error_after"] < report.layers[name]["output_error_before"]
    # q reads the model's input, so nothing before it is corrected: its error was the one that is reported
    assert report.layers["q"]["mean_error_before"] == pytest.approx(before["q"].square().mean().sqrt().item(), rel=1e-3)


def test_each_site_sees_the_corrected_ones_before_it():
    """Corrected alone, down's mean error has another size than behind six corrected sites."""
    shifts = []
    for select in (Select(), Select(name="down")):
        graph, context = solved()
        BiasCorrection(select=select).run(graph, context)
        shifts.append(graph.constant("down.bias") - block().down.bias)
    assert not torch.allclose(shifts[0], shifts[1], rtol=0.05)


def test_held_out_output_is_nearer():
    """Clipped results of ReLUs are all too small: what they sum up to has a mean error."""

    def rectified() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 16)]
        return nn.Sequential(*layers).eval()

    held_out = torch.cat(batches(seed=9))
    errors = []
    for correct in (False, True):
        graph, context = solved(percentile=95.0, model=rectified(), samples=batches(tokens=256))
        if correct:
            BiasCorrection().run(graph, context)
        QuantizeSites().run(graph, context)
        (name,) = (str(node.target) for node in graph.nodes if node.op == "placeholder")
        with torch.no_grad():
            errors.append((graph.module(**{name: held_out}) - rectified()(held_out)).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_biases_are_changed_where_there_are_and_made_where_there_are_none():
    graph, context = solved()
    text = graph_text(graph.module)
    assert "k.bias" not in text and "aten.linear(x, k.weight)" in text
    BiasCorrection(select=Select(name="[qk]")).run(graph, context)
    text = graph_text(graph.module)
    assert f"k.bias: float32[{WIDTH}] = parameter" in text and "aten.linear(x, k.weight, k.bias)" in text
    assert "aten.linear(x, q.weight, q.bias)" in text and "bias_1" not in text
    assert graph.site("k").bias == "k.bias" and graph.site("o").bias is None
    assert not torch.equal(graph.constant("q.bias"), block().q.bias)


def test_a_layer_that_is_called_twice_gets_a_bias_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    model = Twice().eval()
    original = copy.deepcopy(model)
    graph, context = solved(model=model)
    report = BiasCorrection().run(graph, context)
    assert report.changed == 2
    first, second = (graph.constant(site.bias) for site in graph.sites)
    assert not torch.equal(first, second)
    verify(graph, "analysed")
    assert torch.equal(model.layer.bias, original.layer.bias)  # the caller's module is as it was


def test_what_is_left_alone_and_why():
    graph, context = calibrated(STATIC, overrides=[{"select": {"name": "q"}, "scheme": "float"}])
    with pytest.raises(GateError, match="(?s)bias_correction matched nothing.*k: not solved; put bias_correction after"):
        PassManager(Trace()).run(graph, context, [BiasCorrection()])
    RoundToNearest().run(graph, context)
    graph.site("o").role = "head"
    report = BiasCorrection(select=Select()).run(graph, context)
    assert report.skipped == [
        Skip("q", "the recipe keeps it in float"),
        Skip("o", "the head; bias_correction: {head: true} takes it"),
    ]
    graph, context = solved()
    graph.site("o").role = "head"
    assert BiasCorrection(head=True).run(graph, context).matched == 7


def test_the_numbers_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 4, generator=generator)
    y_float = y + 0.1 * torch.randn(50, 4, generator=generator) + torch.tensor([0.5, -0.2, 0.0, 1.0])
    error = OutputError(4)
    for part in range(0, 50, 7):
        error.update(y[part : part + 7], y_float[part : part + 7])
    shift = error.mean().float()
    assert torch.allclose(shift, (y_float - y).mean(dim=0), atol=1e-6)
    numbers = error.numbers(shift)
    relative = lambda z: ((y_float - z).square().sum() / y_float.square().sum()).item()  # noqa: E731
    assert numbers["output_error_before"] == pytest.approx(relative(y), rel=1e-5)
    assert numbers["output_error_after"] == pytest.approx(relative(y + shift), rel=1e-4)
    assert numbers["mean_error_after"] < 1e-7 < numbers["mean_error_before"]
