"""AWQ: the loss is the true error, the search never loses to plain rounding, and the function stays the same."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.numerics import affine
from qcompiler.numerics.hessian import second_moment
from qcompiler.numerics.scale_search import Reader, awq_factors, expected_error, search_awq
from qcompiler.ops.formats import AffineFormat
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.passes.transform import fold_statistics
from qcompiler.passes.transform.awq import Awq
from qcompiler.recipe.schema import Select
from tests.passes.scaled import INNER, INT4, output, prepared, samples

INT4_G32 = AffineFormat(4, 32)


def reader(n: int = 24, k: int = 64, clipping: str = "mse", seed: int = 0) -> Reader:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return Reader(weight, torch.arange(k), INT4_G32, clipping=clipping)


def salient(k: int = 64, tokens: int = 200) -> torch.Tensor:
    """Tokens of which a few channels are large."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1))
    x[:, [2, 40]] *= 30
    return x


def test_a_ratio_of_zero_is_no_scaling() -> None:
    assert torch.equal(awq_factors(torch.rand(9) * 100, 0.0), torch.ones(9, dtype=torch.float64))


def test_factors_are_centred_and_bounded() -> None:
    s = awq_factors(torch.tensor([0.0, 1e-9, 1.0, 100.0]), 0.5)
    assert s.min() * s.max() == pytest.approx(1)
    assert torch.allclose(s / s[0], torch.tensor([1e-4, 1e-4, 1.0, 10.0], dtype=torch.float64) / 1e-4)


def test_the_loss_is_the_mean_error_of_the_outputs() -> None:
    x, one = salient(), reader()
    s = awq_factors(x.abs().mean(0), 0.4)
    rounded = affine.fit(one.weight * s.float(), INT4_G32).dequantize()
    expected = (x.double() @ one.weight.double().T - (x / s) @ rounded.double().T).square().sum(1).mean()
    assert expected_error([(one, second_moment(x))], s) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("clipping", ["mse", "minmax", "output"])
def test_the_search_never_loses_to_rounding_and_gains_where_channels_stand_out(clipping: str) -> None:
    for x, gains in ((salient(), True), (torch.randn(200, 64), False)):
        one = reader(clipping=clipping)
        found = search_awq([(one, second_moment(x).float())], x.abs().mean(0))
        importance = x.square().mean(0) if clipping == "output" else None
        kind = "mse" if clipping == "output" else clipping
        plain = affine.fit(one.weight, INT4_G32, kind, importance=importance).dequantize()
        error = ((one.weight - plain).double() @ x.T.double()).square().sum(0).mean()
        assert found.before == pytest.approx(float(error), rel=1e-4)
        assert found.after <= found.before
        if gains:
            # Rounding for the output knows of the channels already.
            assert found.exponent is not None and found.exponent > 0
            assert found.after < (0.7 if clipping == "output" else 0.4) * found.before


def test_every_fold_of_a_block_gains_or_stays_and_the_function_is_the_same() -> None:
    graph, context = prepared(INT4, outlier=20.0)
    before = output(graph)
    report = Awq().run(graph, context)
    records = report.notes["folds"]
    assert [record["kind"] for record in records] == ["norm-linear", "value-output", "norm-linear", "up-down"]
    assert report.matched == 4 and report.changed == sum(record["ratio"] > 0 for record in records) > 0
    assert all(record["error_after"] <= record["error_before"] for record in records)
    assert {name for record in records for name in record["sites"]} == set("qkvo") | {"gate", "up", "down"}
    assert torch.allclose(output(graph), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_the_loss_of_the_layer_after_rounding_is_the_one_reported() -> None:
    graph, context = prepared(INT4, outlier=20.0)
    (record,) = [r for r in Awq(folds=("up-down",), clipping="mse").run(graph, context).notes["folds"]]
    plain, _ = prepared(INT4, outlier=20.0)
    graph.materialise()

    def inputs(which) -> torch.Tensor:
        seen = []

        class Spy(torch.fx.Interpreter):
            def run_node(self, node):
                value = super().run_node(node)
                if node is which.site("down").node.args[0]:
                    seen.append(value.reshape(-1, INNER))
                return value

        for sample in samples():
            Spy(which.module).run(*torch.utils._pytree.tree_leaves(sample))
        return torch.cat(seen).double()

    rounded = affine.fit(graph.constant("down.weight"), INT4_G32).dequantize().double()
    with torch.no_grad():
        wanted = inputs(plain) @ plain.constant("down.weight").double().T
        error = (inputs(graph) @ rounded.T - wanted).square().sum(1).mean()
    assert record["error_after"] == pytest.approx(float(error), rel=1e-3)


def test_it_is_the_same_every_time() -> None:
    first, second = ([r["scales"] for r in Awq().run(*prepared(INT4, 20.0)).notes["folds"]] for _ in range(2))
    assert first == second


def test_large_weights_are_searched_on_a_sample_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = prepared(INT4)
    whole, share = fold_statistics.sample_rows(graph, graph.site("gate"), 32, seed=0)
    assert torch.equal(whole, graph.constant("gate.weight")) and share == 1
    monkeypatch.setattr(fold_statistics, "WORK", 12 * 32)
    monkeypatch.setattr(fold_statistics, "FEWEST_ROWS", 1)
    rows, share = fold_statistics.sample_rows(graph, graph.site("gate"), 32, seed=0)
    assert rows.shape == (12, 32) and share == INNER / 12
    assert all(any(torch.equal(row, other) for other in whole) for row in rows)
    graph, context = prepared(INT4, outlier=20.0)
    assert all(record["error_after"] <= record["error_before"] for record in Awq().run(graph, context).notes["folds"])


def test_what_is_not_selected_is_in_the_report() -> None:
    graph, context = prepared(INT4, overrides=[{"select": {"name": "o"}, "scheme": "float"}])
    report = Awq(select=Select(name="[!d]*")).run(graph, context)
    reasons = {skip.node: skip.reason for skip in report.skipped}
    assert reasons == {"o": "the recipe keeps it in float", "down": "not selected"}
    report = Awq(folds=("value-output",)).run(*prepared(INT4))
    assert "leaves out" in {skip.node: skip.reason for skip in report.skipped}["gate"]


def test_a_solved_site_is_not_scaled() -> None:
    graph, context = prepared(INT4)
    RoundToNearest(clipping="minmax").run(graph, context)
    with pytest.raises(UsageError, match="was quantized before"):
        Awq().run(graph, context)


def test_calibration_samples_are_needed() -> None:
    graph, context = prepared(INT4)
    context.samples = tuple
    with pytest.raises(UsageError, match="calibration samples"):
        Awq().run(graph, context)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="steps"):
        Awq.parse({"steps": 0})
    with pytest.raises(ValueError, match="folds"):
        Awq.parse({"folds": ["sideways"]})
