"""Outlier columns: those that reach the threshold, as many as allowed, and none of them in the rounded weight."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import GateError, UsageError
from qcompiler.numerics import affine
from qcompiler.passes.observe.find_outliers import FindOutliers
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Skip
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe import load
from qcompiler.recipe.schema import Select
from tests.calibrated import WIDTH, batches, block, calibrated, inputs_of

TOKEN = {"bits": 8, "activations": "int8-token"}


def spiked(*columns: int, value: float = 50.0) -> list[torch.Tensor]:
    """Small inputs, and in some columns one token (of a batch of its own) that is far larger."""
    samples = [x / 10 for x in batches()]
    for index, column in enumerate(columns):
        samples[index % len(samples)][3, column] = -value - index
    return samples


def found(step: FindOutliers, samples: list[torch.Tensor], linear=TOKEN, **recipe):
    graph, context = calibrated(linear, samples=samples, **recipe)
    return graph, context, step.run(graph, context)


def test_columns_that_reach_the_threshold():
    samples = spiked(70, 11)
    inputs = inputs_of(block(), samples)
    step = FindOutliers(max_share=0.5)
    _, context, report = found(step, samples)
    assert report.matched == 7 and not report.fallbacks
    for name, x in inputs.items():
        expected = (x.abs().amax(dim=0) >= 6.0).nonzero().flatten()
        columns = context.outliers.get(name, torch.empty(0, dtype=torch.long))
        assert torch.equal(columns, expected) and columns.dtype == torch.int64
        assert report.layers[name].get("outlier_columns", 0) == len(expected)
        assert report.layers[name]["largest_activation"] == pytest.approx(x.abs().max().item(), rel=1e-5)
    assert context.outliers["q"].tolist() == context.outliers["v"].tolist() == [11, 70]
    assert report.changed == len(context.outliers) and report.notes["columns"] == sum(map(len, context.outliers.values()))


def test_without_outliers_sites_stay_plain():
    _, context, report = found(FindOutliers(threshold=1e3), spiked(70))
    assert context.outliers == {} and report.matched == 7 and report.changed == 0 and not report.fallbacks


def test_the_threshold_itself_counts():
    samples = spiked(70, value=8.0)
    largest = max(x[:, 70].abs().max().item() for x in samples)
    assert found(FindOutliers(threshold=largest), samples)[1].outliers["q"].tolist() == [70]
    assert "q" not in found(FindOutliers(threshold=largest * 1.001), samples)[1].outliers


def test_beyond_the_share_the_largest_are_kept_and_the_site_falls_back():
    samples = spiked(70, 11, 30)  # 50, 51 and 52: 2 % of 96 columns is one
    select = Select(name="[qkv]")
    _, context, report = found(FindOutliers(select=select), samples)
    assert all(context.outliers[name].tolist() == [30] for name in "qkv")
    assert [skip.node for skip in report.fallbacks] == ["q", "k", "v"]
    assert report.fallbacks[0].reason.startswith("3 of 96 input columns reach 6 and 1 may stay in float")
    asked = found(FindOutliers(select=select, beyond="keep_largest"), samples)
    assert all(torch.equal(asked[1].outliers[name], context.outliers[name]) for name in "qkv")
    assert not asked[2].fallbacks and asked[2].skipped[-3:] == report.fallbacks
    assert asked[2].layers["q"]["outlier_columns"] == 1 and asked[2].layers["q"]["columns_over_threshold"] == 3
    # what the message says to set is enough
    assert "max_share: 0.032}" in report.fallbacks[0].reason
    _, context, report = found(FindOutliers(select=select, max_share=0.032), samples)
    assert context.outliers["q"].tolist() == [11, 30, 70] and not report.fallbacks
    # equal columns: the first ones, whatever the order of the samples
    for order in (samples, samples[::-1]):
        even = [x.clone() for x in order]
        even[0][0, [80, 5, 40]] = 99.0
        assert found(FindOutliers(select=select, max_share=0.025), even)[1].outliers["q"].tolist() == [5, 40]


def test_a_fallback_fails_the_run_unless_allowed():
    samples, select = spiked(70, 11), Select(name="q")
    graph, context = calibrated(TOKEN, samples=samples)
    with pytest.raises(GateError, match="1 fallbacks, 0 allowed:\n  q: 2 of 96 input columns"):
        PassManager(Trace()).run(graph, context, [FindOutliers(select=select)])
    graph, context = calibrated(TOKEN, samples=samples, allow={"fallbacks": 1})
    PassManager(Trace()).run(graph, context, [FindOutliers(select=select)])
    assert context.outliers["q"].tolist() == [11]


def test_the_rounded_weight_has_no_outlier_columns():
    """They are zero, and the row's scale is that of the other columns."""
    model = block()
    with torch.no_grad():
        model.q.weight[:, 70] = 40.0
    samples = spiked(70)
    graph, context = calibrated(TOKEN, model, samples)
    FindOutliers(select=Select(name="q")).run(graph, context)
    report = RoundToNearest().run(graph, context)
    solution = context.solutions["q"]
    assert (solution.dequantize()[:, 70] == 0).all()
    rest = model.q.weight.detach().clone()
    rest[:, 70] = 0
    expected = affine.fit(rest, solution.format)
    assert torch.equal(solution.codes, expected.codes) and torch.equal(solution.scales, expected.scales)
    assert report.layers["q"]["weight_sqnr_db"] == pytest.approx(affine.sqnr_db(rest, expected.dequantize()))
    assert torch.equal(model.q.weight.detach()[:, 70], torch.full((WIDTH,), 40.0))


def test_what_is_left_alone_and_why():
    overrides = [
        {"select": {"name": "q"}, "scheme": "float"},
        {"select": {"name": "k"}, "scheme": {"bits": 8, "activations": "float"}},
        {"select": {"name": "o"}, "scheme": {"bits": 8, "activations": "int8-token"}},
    ]
    graph, context = calibrated(TOKEN, overrides=overrides)
    RoundToNearest().run(graph, context)
    del context.solutions["gate"]
    report = FindOutliers(max_share=1.0, select=Select(name="[gv]*")).run(graph, context)
    assert report.skipped == [
        Skip("q", "the recipe keeps it in float"),
        Skip("k", "its activations stay in float: outliers widen nothing"),
        *(
            Skip(name, "solved already, with its outlier columns; put llm_int8 before the solve passes")
            for name in ("v", "o", "up", "down")
        ),
    ]
    assert report.matched == 1 and set(context.outliers) <= {"gate"}


def test_a_shared_weight_keeps_all_its_columns():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(50, WIDTH), torch.nn.Linear(WIDTH, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x) * 100)

    ids = torch.arange(12).reshape(3, 4)
    graph, context = calibrated(TOKEN, Tied().eval(), [ids], embed={"bits": 8})
    report = FindOutliers().run(graph, context)
    (skip,) = report.skipped
    assert not report.matched and skip.reason == "its weight is shared, and the other reader needs every column of it"


def test_options_are_refused_with_the_recipe():
    for options, message in [({"threshold": 0}, "threshold must be above 0"), ({"max_share": 2}, "max_share must be in")]:
        with pytest.raises(UsageError, match=message):
            load({"name": "bad", "linear": TOKEN, "passes": [{"llm_int8": options}]})
