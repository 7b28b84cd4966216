"""SmoothQuant: the published factors, exact in float, and a smaller error where channels stand out."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.numerics.scale_search import Reader, sampled_error, search_smoothing, smoothing_factors
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.passes.transform.smooth_quant import SmoothQuant
from qcompiler.recipe.schema import Select
from tests.passes.scaled import INT4, INT8, D, output, prepared, samples

ROW = AffineFormat(8, 0)


def outliers(k: int = 64) -> torch.Tensor:
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(1))
    x[:, [2, 40]] *= 80
    return x


def reader(activation: Activation) -> Reader:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    return Reader(weight, torch.arange(64), ROW, clipping="minmax", activation=activation)


def maxima(x: torch.Tensor, one: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    return x.abs().amax(0), one.weight.abs().amax(0)


def test_the_published_factors() -> None:
    x, w = torch.tensor([4.0, 100.0, 1e-7, 0.0, 3.0]), torch.tensor([0.25, 1.0, 1.0, 1.0, 0.0])
    expected = [4**0.8 / 0.25**0.2, 100**0.8, 1e-5**0.8, 1.0, 1.0]
    assert smoothing_factors(x, w, 0.8).tolist() == pytest.approx(expected)


def test_alpha_of_one_makes_all_channels_equal_and_of_zero_all_columns() -> None:
    x, w = torch.rand(50) + 0.1, torch.rand(50) + 0.1
    assert torch.allclose(x / smoothing_factors(x, w, 1.0), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(w * smoothing_factors(x, w, 0.0), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("activation", [Activation.INT8_TOKEN, Activation.INT8_BLOCK, Activation.INT8_STATIC])
def test_the_error_shrinks_where_channels_stand_out(activation: Activation) -> None:
    x, one = outliers(), reader(activation)
    largest, weights = maxima(x, one)
    plain = sampled_error([(one, x)], largest, torch.ones(64, dtype=torch.float64))
    smooth = sampled_error([(one, x)], largest, smoothing_factors(largest, weights, 0.5))
    found = search_smoothing([(one, x)], largest, weights)
    assert smooth < 0.1 * plain
    assert found.before == plain and found.after <= smooth
    assert found.exponent is not None and 0.2 < found.exponent < 0.9


def test_the_search_may_find_that_nothing_is_best() -> None:
    x = torch.ones(20, 64)  # one range fits all channels, and the weights' columns differ
    one = reader(Activation.INT8_TOKEN)
    found = search_smoothing([(one, x)], *maxima(x, one))
    assert found.after <= found.before
    identity = sampled_error([(one, x)], x[0], torch.ones(64, dtype=torch.float64))
    assert found.before == identity


def test_float_activations_lose_nothing_but_the_weights() -> None:
    x, one = outliers(), reader(Activation.FLOAT)
    error = (x @ (one.rounded(torch.ones(64)) - one.weight).T).double().square().sum(1).mean()
    found = sampled_error([(one, x)], x.abs().amax(0), torch.ones(64, dtype=torch.float64))
    assert found == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_a_block_is_the_same_in_float_and_better_in_int8(alpha) -> None:
    graph, context = prepared(INT8, outlier=50.0)
    before = output(graph)
    report = SmoothQuant(alpha=alpha).run(graph, context)
    records = report.notes["folds"]
    assert [record["kind"] for record in records] == ["norm-linear", "value-output", "norm-linear", "up-down"]
    assert sum(record["error_after"] for record in records) < 0.5 * sum(record["error_before"] for record in records)
    assert torch.allclose(output(graph), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_factors_come_from_every_reader_of_the_norm_and_every_token() -> None:
    graph, context = prepared(INT8, outlier=50.0)
    x = torch.cat([sample["x"].reshape(-1, D) for sample in samples()])
    gain = graph.constant("norm1.weight").clone()
    largest = torch.nn.functional.rms_norm(x, (D,), gain, None).abs().amax(0)
    weights = torch.stack([graph.constant(f"{name}.weight").abs().amax(0) for name in "qkv"]).amax(0)
    SmoothQuant(alpha=0.7).run(graph, context)
    s = smoothing_factors(largest, weights, 0.7)
    assert torch.allclose(graph.constant("norm1.weight"), (gain / s).float(), rtol=1e-5)


def test_heads_that_share_values_share_factors() -> None:
    graph, context = prepared(INT8, outlier=50.0)
    plain = graph.constant("o.weight").clone()
    SmoothQuant(folds=("value-output",)).run(graph, context)
    s = (graph.constant("o.weight") / plain)[0].reshape(2, 2, 8)  # value head, repeat, channel
    assert torch.allclose(s[:, 0], s[:, 1], rtol=1e-5) and float(s.max() / s.min()) > 2


def test_only_sites_with_int8_activations_unless_selected() -> None:
    graph, context = prepared(INT4)
    report = SmoothQuant().run(graph, context)
    assert report.matched == 0 and {skip.node for skip in report.skipped} == set("qkvo") | {"gate", "up", "down"}
    assert all("activations stay in float" in skip.reason for skip in report.skipped)
    report = SmoothQuant(select=Select(name="down")).run(graph, context)
    assert [record["sites"] for record in report.notes["folds"]] == [["down"]]


def test_a_measured_range_forbids_scaling() -> None:
    graph, context = prepared(INT8)
    context.static_ranges["down"] = (0.1, 0)
    with pytest.raises(UsageError, match="was measured before"):
        SmoothQuant().run(graph, context)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": "best"}, {"tokens": 0}])
def test_options_are_checked(options) -> None:
    with pytest.raises(ValueError):
        SmoothQuant.parse(options)
