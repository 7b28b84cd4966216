"""Static ranges: those of what the layer reads, in the stream that it will read."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import GateError, InputError, UsageError
from qcompiler.numerics.ranges import estimator, static_grid
from qcompiler.passes.observe.calibrate_ranges import CalibrateRanges
from qcompiler.passes.observe.place_observers import PlaceObservers
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe import load
from qcompiler.recipe.schema import Select
from tests.calibrated import batches, block, calibrated, inputs_of

STATIC = {"bits": 8, "activations": "int8-static"}
METHODS = ("minmax", "moving_average", "percentile", "mse", "entropy")


def ranges(step: CalibrateRanges, solve: bool = False, **given):
    graph, context = calibrated(STATIC, **given)
    if solve:
        RoundToNearest().run(graph, context)
    PlaceObservers().run(graph, context)
    return graph, context, step.run(graph, context)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_the_layers_inputs(method, symmetric):
    _, context, report = ranges(CalibrateRanges(method=method, symmetric=symmetric))
    assert report.matched == report.changed == 7
    for name, x in inputs_of(block(), batches()).items():
        expected = estimator(method, symmetric)
        for sample in x.split(32):
            expected.update(sample)
        low, high = report.layers[name]["activation_range"]
        # a module's own products may differ from the graph's in the last bit, and a bin is a 1024th of the range
        assert (low, high) == pytest.approx(expected.range(), rel=2e-3, abs=1e-6)
        assert context.static_ranges[name] == static_grid(low, high, symmetric)
        assert (context.static_ranges[name][1] == 0) or not symmetric
        assert report.layers[name]["activation_scale"] == context.static_ranges[name][0]


def test_sites_of_one_value_share_its_range():
    _, context, _ = ranges(CalibrateRanges())
    found = context.static_ranges
    assert found["q"] == found["k"] == found["v"] != found["o"] and found["gate"] == found["up"]


def test_solved_predecessors_run_quantized_with_their_own_range():
    """Two solved layers, the second reads the first's result: its range is that of the rounded product of rounded inputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 24), torch.nn.Linear(24, 8)).eval()
    scheme = {"bits": 2, "group": 32, "activations": "int8-static"}  # coarse: the quantized stream is another one
    graph, context = calibrated(scheme, model)
    RoundToNearest().run(graph, context)
    PlaceObservers().run(graph, context)
    CalibrateRanges().run(graph, context)
    scale, zero = context.static_ranges["0"]
    x = torch.cat(batches())
    rounded = scale * (x / scale).round().clamp(-127, 127)
    expected = rounded @ context.solutions["0"].dequantize().T + model[0].bias
    assert context.static_ranges["1"][0] * 127 == pytest.approx(expected.abs().max().item(), rel=1e-4)
    assert context.static_ranges["1"][0] * 127 != pytest.approx(model[0](x).abs().max().item(), rel=1e-3)


def test_columns_that_stay_in_float_do_not_count():
    samples = batches()
    for x in samples:
        x[:, 5] *= 100
    graph, context = calibrated(STATIC, samples=samples)
    for name in ("q", "k", "v"):
        context.outliers[name] = torch.tensor([5])
    context.outliers["q"] = torch.tensor([5, 6])  # what only one of them keeps in float counts for the others
    PlaceObservers().run(graph, context)
    report = CalibrateRanges().run(graph, context)
    rest = torch.cat(samples)
    rest[:, 5] = 0
    assert report.layers["q"]["activation_range"][1] == rest.abs().max()


def test_two_passes_share_the_work_by_selection():
    first, second = CalibrateRanges(select=Select(name="[qkd]*")), CalibrateRanges(method="entropy")
    graph, context = calibrated(STATIC)
    trace = Trace()
    PassManager(trace).run(graph, context, [PlaceObservers(), first, second])
    layers = trace.layers()
    assert {name: layer["activation_method"] for name, layer in layers.items()} == {
        "q": "minmax", "k": "minmax", "v": "entropy", "o": "entropy", "gate": "entropy", "up": "entropy", "down": "minmax",
    }  # fmt: skip
    assert [entry.record["notes"].get("removed_observers") for entry in trace.entries] == [None, 1, 3]
    # v's observer waits, although q and k are done with it
    assert trace.entries[1].text.count("qcompiler.observe") == 3


def test_an_observer_that_nobody_calibrates_fails_the_stage():
    graph, context = calibrated(STATIC)
    with pytest.raises(GateError, match="an observer is left"):
        PassManager(Trace()).run(graph, context, [PlaceObservers(), CalibrateRanges(select=Select(name="q"))])


def test_without_observers_it_says_what_is_missing():
    graph, context = calibrated(STATIC)
    with pytest.raises(GateError, match="matched nothing.*\n.*put place_observers before calibrate_ranges"):
        PassManager(Trace()).run(graph, context, [CalibrateRanges()])


def test_values_that_are_not_finite_name_the_layer():
    samples = batches()
    samples[2][3, 4] = float("nan")
    with pytest.raises(InputError, match="layer q, k, v: .*NaN in calibration sample 2"):
        ranges(CalibrateRanges(), samples=samples)


def test_no_samples_no_ranges():
    graph, context = calibrated(STATIC)
    context.samples = tuple
    PlaceObservers().run(graph, context)
    with pytest.raises(UsageError, match="needs calibration samples"):
        CalibrateRanges().run(graph, context)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "median"}, "calibrate_ranges: method: Input should be 'minmax'"),
        ({"method": "entropy", "bins": 128}, "bins must be at least 2048, got 128"),
        ({"method": "percentile", "percentile": 120}, "percentile must be in"),
        ({"methods": "mse"}, "unknown option 'methods'; did you mean 'method'"),
    ],
)
def test_options_are_refused_with_the_recipe(options, message):
    with pytest.raises(UsageError, match=message):
        load({"name": "bad", "linear": STATIC, "passes": ["place_observers", {"calibrate_ranges": options}]})
