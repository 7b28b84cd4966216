"""Folds on small graphs: what passes, and every reason for which a scale is stopped."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qcompiler.passes.analyse.folds import find_folds
from qcompiler.passes.transform.awq import Awq
from qcompiler.passes.transform.smooth_quant import SmoothQuant
from tests.calibrated import batches, calibrated
from tests.passes.folded import D, apply_all, found, largest_error, outputs, parts

SAME = dict.fromkeys("abcd", (D, D))


def reason(join, site: str, **widths) -> str:
    folds, refusals = found(join, **widths)
    assert not [fold for fold in folds if site in fold.sites]
    return refusals[site].reason


def attention(m, x, value):
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (m.a(x), m.b(x), value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_two_linears() -> None:
    folds, _ = found(lambda m, x: m.b(m.a(x)), a=(D, 32), b=(32, D))
    assert [(f.kind, f.name, f.sites, f.channels) for f in folds] == [("linear-linear", "a", ["b"], 32)]
    assert {entry.name for entry in folds[0].divided} == {"a.weight", "a.bias"}


def test_an_attention_written_out() -> None:
    def join(m, x):
        scores = (m.b(x) @ m.c(x).mT) / 4.0
        return m.d(scores.softmax(-1) @ m.a(x))

    folds, _ = found(join, **SAME)
    assert [(f.kind, f.name, f.sites) for f in folds] == [("value-output", "a", ["d"])]


def test_a_norm_written_out_with_its_shift() -> None:
    def join(m, x):
        x = x - x.mean(-1, keepdim=True)
        return m.a(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * m.gain + m.shift)

    (fold,), _ = found(join, a=(D, D))
    assert [(entry.name, entry.offset) for entry in fold.divided] == [("gain", 0.0), ("shift", 0.0)]


def test_a_gain_of_one_plus_a_cast_weight() -> None:
    (fold,), _ = found(lambda m, x: m.a(F.normalize(x) * (1.0 + m.gain.float())), a=(D, D))
    assert [(entry.name, entry.offset) for entry in fold.divided] == [("gain", 1.0)]


def test_one_linear_for_gate_and_up_in_either_order() -> None:
    def join(m, x):
        up, gate = m.a(x).chunk(2, dim=-1)
        return m.b(up * F.silu(gate))

    (fold,), _ = found(join, a=(D, 64), b=(32, D))
    assert fold.kind == "up-down"
    assert fold.divided[0].channels.tolist() == list(range(32)) + [-1] * 32


def test_two_readers_of_different_channels_are_two_folds() -> None:
    def join(m, x):
        left, right = m.a(x).split([4, D - 4], dim=-1)
        return m.b(left), m.c(right)

    folds, _ = found(join, a=(D, D), b=(4, D), c=(D - 4, D))
    assert [(f.sites, f.channels) for f in folds] == [(["b"], 4), (["c"], D - 4)]


def test_a_pool_over_tokens_passes() -> None:
    folds, _ = found(lambda m, x: m.b(m.norm(x).mean(1)), b=(D, D))
    assert [f.kind for f in folds] == ["norm-linear"]


def test_activations_that_are_not_homogeneous_stop() -> None:
    for function in (F.silu, F.gelu, torch.sigmoid, torch.exp):
        assert "does not commute" in reason(lambda m, x, f=function: m.b(f(m.a(x))), "b", a=(D, D), b=(D, D))


def test_a_gate_is_never_scaled_but_what_it_gates_is() -> None:
    folds, refusals = found(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), **SAME)
    assert [(f.kind, f.name) for f in folds] == [("up-down", "b")]
    assert set(refusals) == {"a", "b"}


def test_a_product_of_a_value_with_itself_stops() -> None:
    text = reason(lambda m, x: (lambda y: m.b(y * F.relu(y)))(m.a(x)), "b", a=(D, D), b=(D, D))
    assert "both carry the scale" in text


def test_a_residual_branch_stops() -> None:
    def join(m, x):
        y = m.norm(x)
        return y + m.a(y)

    assert "residual" in reason(join, "a", a=(D, D))


def test_an_offset_stops() -> None:
    assert "adds a constant" in reason(lambda m, x: m.b(m.a(x) + 1.0), "b", a=(D, D), b=(D, D))


def test_another_reader_that_cannot_be_scaled_stops() -> None:
    def join(m, x):
        y = m.norm(x)
        return m.a(y), y.softmax(-1)

    assert "softmax" in reason(join, "a", a=(D, D))


def test_an_output_of_the_model_stops() -> None:
    def join(m, x):
        y = m.norm(x)
        return m.a(y), y

    assert "output of the model" in reason(join, "a", a=(D, D))


def test_a_weight_that_is_read_twice_stops() -> None:
    def join(m, x):
        y = m.norm(x)
        return m.a(y) + m.a(F.silu(x))

    assert "a.weight is read in 2 places" in reason(join, "a", a=(D, D))


def test_a_gain_that_two_norms_share_stops() -> None:
    def join(m, x):
        return m.a(F.normalize(x) * m.gain) + m.b(F.softmax(x, -1) * m.gain)

    text = reason(join, "a", a=(D, D), b=(D, D))
    assert "gain is read in 2 places" in text


def test_tied_storage_stops() -> None:
    graph = parts(lambda m, x: m.b(m.a(x)) + m.c(x), **SAME)
    graph.module.c.weight = torch.nn.Parameter(graph.module.b.weight.detach())
    (refusal,) = [r for r in find_folds(graph)[1] if r.site == "b"]
    assert refusal.reason == "b.weight is tied to c.weight"


def test_a_norm_of_queries_stops_at_the_scores() -> None:
    def join(m, x):
        q = m.norm(m.a(x))
        return m.d((q @ m.b(x).mT).softmax(-1) @ m.c(x))

    folds, refusals = found(join, **SAME)
    assert [(f.kind, f.name) for f in folds] == [("value-output", "c")]
    text = reason(lambda m, x: m.a(m.norm(x) @ m.b(x).mT), "a", a=(5, D), b=(D, D))
    assert "queries meet keys" in text


def test_a_norm_of_values_stops() -> None:
    text = reason(lambda m, x: m.d(attention(m, x, m.norm(m.c(x)) + x)), "d", **SAME)
    assert "residual" in text
    folds, refusals = found(lambda m, x: m.d(m.norm(attention(m, x, m.c(x)))), **SAME)
    assert [(f.kind, f.name) for f in folds] == [("norm-linear", "norm.weight")]
    assert "c" not in [f.name for f in folds]


def gated(m, x):
    gate, query = m.a(x).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, m.b(x), m.c(x)))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return m.d(y * torch.sigmoid(gate))


def test_a_gated_attention_is_refused_unless_asked_for() -> None:
    widths = dict(SAME, a=(D, 2 * D))
    assert "gates the attention's result" in reason(gated, "d", **widths)
    graph = parts(gated, **widths)
    folds, _ = find_folds(graph, gated_attention=True)
    assert [(f.kind, f.name, f.sites) for f in folds] == [("value-output", "c", ["d"])]
    before = outputs(graph)
    apply_all(graph, folds, adversarial=True)
    assert largest_error(outputs(graph), before) < 1e-9


def test_tokens_of_different_scales_stop() -> None:
    def join(m, x):
        return m.b(torch.cat([m.a(x), x.sin()], 1))

    assert "from token to token" in reason(join, "b", a=(D, D), b=(D, D))


def test_a_sum_over_channels_stops() -> None:
    def join(m, x):
        return m.b(m.a(x).unflatten(-1, (4, 4)).sum(-1))

    assert "sums over the scaled channels" in reason(join, "b", a=(D, D), b=(4, D))


def test_a_sum_of_channels_with_different_scales_stops() -> None:
    def join(m, x):
        y = m.a(x)
        return m.b(y[..., :8] + y[..., 8:])

    assert "different scales" in reason(join, "b", a=(D, D), b=(8, D))


def test_channels_of_two_sources_are_refused() -> None:
    def join(m, x):
        return m.b(torch.cat([m.a(x), x.sin()], -1))

    assert "16 of 32 input channels of b" in reason(join, "b", a=(D, D), b=(2 * D, D))


def test_a_rounding_cast_stops() -> None:
    assert "int32" in reason(lambda m, x: m.b(m.a(x).to(torch.int32).float()), "b", a=(D, D), b=(D, D))


def test_filling_in_a_number_stops_and_zero_does_not() -> None:
    def join(m, x, number):
        return m.b(m.a(x).masked_fill(x > 0, number))

    assert "fills in a number" in reason(lambda m, x: join(m, x, 1.0), "b", a=(D, D), b=(D, D))
    assert len(found(lambda m, x: join(m, x, 0.0), a=(D, D), b=(D, D))[0]) == 1


def test_choosing_a_number_stops_and_choosing_zero_does_not() -> None:
    def join(m, x, other):
        return m.b(torch.where(x > 0, m.a(x), other(x)))

    widths = dict(a=(D, D), b=(D, D))
    assert "does not carry the scale" in reason(lambda m, x: join(m, x, torch.ones_like), "b", **widths)
    for zero in (torch.zeros_like, lambda x: torch.zeros([])):
        folds, _ = found(lambda m, x, zero=zero: join(m, x, zero), **widths)
        assert [fold.sites for fold in folds] == [["b"]]


def test_writing_in_place_stops() -> None:
    def join(m, x):
        y = m.a(x)
        y.add_(x)
        return m.b(y)

    assert "in place" in reason(join, "b", a=(D, D), b=(D, D))


def test_a_past_that_is_no_cache_stops() -> None:
    graph = parts(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=(D, D), b=(D, D))
    (refusal,) = [r for r in find_folds(graph)[1] if r.site == "b"]
    assert "an input that does not carry the scale" in refusal.reason


def test_an_input_that_nothing_makes() -> None:
    assert "no linear or norm makes its input" in reason(lambda m, x: m.a(x), "a", a=(D, D))


@pytest.mark.parametrize(
    "pass_, linear", [(SmoothQuant(), {"bits": 8, "activations": "int8-token"}), (Awq(), {"bits": 4, "group": 32})]
)
def test_of_two_folds_that_would_scale_one_input_the_first_does(pass_, linear) -> None:
    """relu(gate) · up: each of the factors could carry the scale of down."""
    graph, context = calibrated(linear)
    (x,) = batches(1)
    before = graph.module(x=x)
    report = pass_.run(graph, context)
    (record,) = report.notes["folds"]
    assert (report.matched, record["sites"]) == (1, ["down"])
    reasons = [skip.reason for skip in report.skipped if "is scaled through" in skip.reason]
    assert len(reasons) == 1 and reasons[0].startswith("what down reads is scaled through ")
    assert torch.allclose(graph.module(x=x), before, rtol=0, atol=2e-5 * float(before.abs().max()))
