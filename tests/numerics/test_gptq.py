"""What the solver promises: lower layer losses, refusals and fallbacks with their reasons, the same bits every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompiler.numerics import affine
from qcompiler.numerics.damping import Factor, NotFactored, factorise
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.hessian import layer_loss, second_moment
from qcompiler.ops.formats import BITS, GROUPS, AffineFormat

FORMATS = [AffineFormat(bits, group, symmetric) for bits in BITS for group in GROUPS for symmetric in (True, False)]
label = lambda format: format.label  # noqa: E731
MODES = {
    "default": GptqOptions(),
    "plain": GptqOptions(passes=1, groups="live", ordering="none", clipping="minmax", importance="uniform"),
    "group-aware": GptqOptions(passes=2, groups="live", ordering="group_aware", importance="activation"),
    "static": GptqOptions(passes=1, ordering="activation", importance="uniform"),
}


def inputs(k=160, tokens=500, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k)[:, None]
    return torch.randn(tokens, k, generator=generator) @ mix


def weight(n=24, k=160, seed=0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1000))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_every_format_has_less_than_half_the_loss_of_rounding(format, mode):
    w, hessian = weight(), second_moment(inputs())
    clipping = "minmax" if mode == "plain" else "mse"  # rounding with the same kind of grid
    result = gptq(w, hessian, format, replace(MODES[mode], compare=clipping == "mse"))
    assert result.fallback is None and result.ordering == MODES[mode].ordering
    solved = result.weight
    groups = format.groups(160)
    assert solved.codes.shape == (24, 160) and solved.codes.dtype == (torch.int8 if format.bits == 8 else torch.uint8)
    assert solved.scales.shape == (24, groups) and solved.scales.dtype == torch.float16
    if format.symmetric:
        assert solved.zeros is None
    else:
        assert solved.zeros.shape == (24, groups) and solved.zeros.dtype == solved.codes.dtype
    low, high = affine.rounding_range(format)
    assert low <= solved.codes.min() and solved.codes.max() <= high
    assert result.loss_after == pytest.approx(layer_loss(w, solved.dequantize(), hessian), rel=2e-3)
    before = layer_loss(w, affine.fit(w, format, clipping).dequantize(), hessian)
    # Its grids count columns by what the sweep pays for them: somewhat better or worse than all alike.
    assert clipping == "minmax" or 0.5 * before < result.loss_before < 1.5 * before
    assert result.loss_after < 0.5 * before


def test_on_average_it_beats_rounding_even_without_correlation():
    """Not in every row: there is little to compensate with."""
    ratios = []
    for seed in range(8):
        x = torch.randn(400, 96, generator=torch.Generator().manual_seed(seed))
        w, hessian = weight(k=96, seed=seed), second_moment(x)
        solved = gptq(w, hessian, AffineFormat(4, 0), GptqOptions(compare=False))
        ratios.append(solved.loss_after / layer_loss(w, affine.fit(w, AffineFormat(4, 0)).dequantize(), hessian))
        assert solved.loss_before is None
    assert sum(ratios) / len(ratios) < 0.95


def test_it_holds_for_inputs_that_it_has_not_seen():
    w = weight()
    solved = gptq(w, second_moment(inputs(tokens=4000)), AffineFormat(4, 32)).weight
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(160, 160, generator=generator) * torch.logspace(0, -1.5, 160)[:, None]
    other = second_moment(torch.randn(4000, 160, generator=torch.Generator().manual_seed(99)) @ mix)
    nearest = affine.fit(w, AffineFormat(4, 32))
    assert layer_loss(w, solved.dequantize(), other) < 0.5 * layer_loss(w, nearest.dequantize(), other)


@pytest.mark.parametrize("format", [AffineFormat(4, 32), AffineFormat(2, 0, False)], ids=label)
def test_more_sweeps_never_lose(format):
    w, hessian = weight(), second_moment(inputs())
    options = [GptqOptions(passes=passes, clipping="minmax", dtype=torch.float64) for passes in (1, 2, 3)]
    losses = [gptq(w, hessian, format, o).loss_after for o in options]
    assert losses[0] > losses[1] >= losses[2]


def test_where_the_inputs_do_not_correlate_it_rounds_to_nearest():
    w, hessian = weight(), torch.diag(torch.rand(160) + 0.5)
    options = GptqOptions(passes=1, importance="uniform")
    for format in (AffineFormat(4, 32, False), AffineFormat(3, 0)):
        solved, nearest = gptq(w, hessian, format, options).weight, affine.fit(w, format)
        assert torch.equal(solved.codes, nearest.codes) and torch.equal(solved.scales, nearest.scales)


def test_importance_is_heard():
    """A column that counts for nothing may be clipped at will: the others get finer steps."""
    w = weight(n=8, k=32)
    w[:, 5] *= 20
    importance = torch.ones(32)
    importance[5] = 0
    for format in (AffineFormat(4, 32), AffineFormat(4, 32, False)):
        plain, weighted = affine.fit(w, format), affine.fit(w, format, importance=importance)
        others = torch.arange(32) != 5
        error = lambda fitted, w=w, others=others: (w - fitted.dequantize())[:, others].square().sum()  # noqa: E731
        assert error(weighted) < 0.5 * error(plain)
        scale, zero = affine.fit_group(w, format, importance=importance)
        assert torch.equal(scale.half(), weighted.scales[:, 0])
        assert format.symmetric or torch.equal(zero, weighted.zeros[:, 0].float())


# ---- hard channels


@pytest.mark.parametrize("mode", MODES)
def test_dead_columns_are_rounded_and_not_zeroed(mode):
    x, w = inputs(), weight()
    x[:, [0, 40, 159]] = 0
    format = AffineFormat(4, 32)
    result = gptq(w, second_moment(x), format, MODES[mode])
    assert result.dead == 3 and result.fallback is None
    scales = result.weight.scales.float().abs().repeat_interleave(32, 1)
    dead = (w - result.weight.dequantize())[:, [0, 40, 159]].abs() / scales[:, [0, 40, 159]]
    assert (result.weight.dequantize()[:, [0, 40, 159]] != 0).any()
    if mode == "plain":  # grids of the whole range: nothing is clipped, and nothing was fed into a dead column
        assert (dead <= 1.01).all()  # the positive end of a symmetric grid has one code less


def test_a_whole_group_of_dead_columns():
    x, w = inputs(), weight()
    x[:, 32:64] = 0
    for mode in MODES.values():
        result = gptq(w, second_moment(x), AffineFormat(4, 32, False), mode)
        error = (w - result.weight.dequantize())[:, 32:64].square().mean()
        assert result.dead == 32 and error < 0.02 * w[:, 32:64].square().mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["duplicate", "constant", "huge", "tiny"])
def test_hard_channels(kind, mode):
    x, w = inputs(), weight()
    if kind == "duplicate":
        x[:, 1:60] = x[:, :1]
    elif kind == "constant":
        x[:, 7] = 3
    else:
        x[:, [7, 90]] *= 1e4 if kind == "huge" else 1e-12
    result = gptq(w, second_moment(x), AffineFormat(4, 32), MODES[mode])
    assert result.fallback is None and torch.isfinite(result.weight.scales).all()
    assert result.loss_after < result.loss_before


def test_fewer_tokens_than_columns():
    w, hessian = weight(), second_moment(inputs(tokens=20))
    result = gptq(w, hessian, AffineFormat(4, 32))
    assert (result.damping, result.attempts, result.fallback) == (0.01, 1, None)
    assert result.loss_after < 0.1 * result.loss_before
    escalated = gptq(w, hessian, AffineFormat(4, 32), GptqOptions(damping=0, floor=0))
    assert escalated.damping > 0 and escalated.attempts > 1 and escalated.fallback is None
    assert escalated.loss_after < escalated.loss_before
    full = gptq(w, second_moment(inputs(tokens=2000)), AffineFormat(4, 32), GptqOptions(damping=0, floor=0))
    assert full.damping == 0 and full.attempts == 1


def test_damping_grows_tenfold_in_both_precisions_up_to_one():
    indefinite = torch.diag(torch.ones(8))
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    found = factorise(indefinite, 0.01, 0.0, None, torch.float32)
    assert isinstance(found, Factor) and (found.damping, found.attempts) == (1.0, 5)  # 0.01 and 0.1 twice, 1 once
    indefinite[0, 1] = indefinite[1, 0] = 3
    refused = factorise(indefinite, 0.01, 0.0, None, torch.float32)
    assert isinstance(refused, NotFactored) and (refused.damping, refused.attempts) == (1.0, 6)


def test_small_diagonal_entries_are_lifted():
    diagonal = torch.tensor([1.0, 1.0, 1e-12, 0.0])
    found = factorise(torch.diag(diagonal), 0.0, 1e-3, None, torch.float64)
    assert isinstance(found, Factor) and found.damping == 0
    assert found.upper.diagonal().square().tolist() == pytest.approx([1, 1, 5e-4, 5e-4])


# ---- fallbacks and refusals


def test_a_layer_that_no_input_reached_is_rounded_and_says_so():
    result = gptq(weight(), torch.zeros(160, 160), AffineFormat(4, 32))
    assert result.fallback == "the Hessian is zero: no calibration input reached the layer"
    assert result.dead == 160 and result.attempts == 0 and result.loss_after == result.loss_before == 0
    assert torch.equal(result.weight.codes, affine.fit(weight(), AffineFormat(4, 32)).codes)


def test_no_factor_no_sweep():
    hessian = torch.eye(160)
    hessian[0, 1] = hessian[1, 0] = 3
    result = gptq(weight(), hessian, AffineFormat(4, 32))
    assert "not positive definite, not even with 1 of its mean diagonal" in result.fallback
    assert result.damping == 1 and result.attempts == 6
    assert torch.equal(result.weight.codes, affine.fit(weight(), AffineFormat(4, 32)).codes)


def test_a_sweep_that_loses_is_not_kept():
    """One sweep with min-max grids, against a search, where there is nothing to compensate."""
    w = weight()
    w[:, ::32] *= 6
    options = GptqOptions(passes=1, clipping="minmax")
    result = gptq(w, torch.eye(160), AffineFormat(2, 32, False), options)
    assert "is above that of rounding to nearest" in result.fallback and result.loss_after == result.loss_before
    assert torch.equal(result.weight.codes, affine.fit(w, AffineFormat(2, 32, False)).codes)
    alone = gptq(w, torch.eye(160), AffineFormat(2, 32, False), GptqOptions(passes=1, clipping="minmax", compare=False))
    assert alone.fallback is None and alone.loss_after > result.loss_before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(value):
    w, hessian = weight(), second_moment(inputs())
    broken = hessian.clone()
    broken[3, 4] = value
    with pytest.raises(ValueError, match="the Hessian has NaN or infinite entries: an activation of the calibration run"):
        gptq(w, broken, AffineFormat(4, 32))
    with pytest.raises(ValueError, match="the cross statistic has NaN or infinite"):
        gptq(w, hessian, AffineFormat(4, 32), cross=broken)
    w[0, 0] = value
    with pytest.raises(ValueError, match="the weight has NaN or infinite entries"):
        gptq(w, hessian, AffineFormat(4, 32))


def test_what_cannot_be_is_refused():
    w, hessian = weight(), second_moment(inputs())
    with pytest.raises(ValueError, match=r"the Hessian is float64 \[160, 160\], expected .* \[64, 64\]"):
        gptq(w[:, :64], hessian, AffineFormat(4, 32))
    with pytest.raises(ValueError, match="the Hessian is float16"):
        gptq(w, hessian.half(), AffineFormat(4, 32))
    with pytest.raises(ValueError, match="negative diagonal entry"):
        gptq(w, -hessian, AffineFormat(4, 32))
    with pytest.raises(ValueError, match="no index to gather them .* use groups 'static', or ordering 'group_aware'"):
        gptq(w, hessian, AffineFormat(4, 32), GptqOptions(groups="live", ordering="activation"))
    with pytest.raises(ValueError, match="the format's group must be 0"):
        gptq(w, hessian, AffineFormat(8, 32), per_tensor=True)
    with pytest.raises(ValueError, match="float16 scales hold at most 65504"):
        gptq(w * 1e7, hessian, AffineFormat(4, 32))
    for wrong in (dict(groups="dynamic"), dict(passes=0), dict(block=0), dict(damping=2.0), dict(dtype=torch.float16)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GptqOptions(**wrong)


def test_one_group_may_be_visited_in_any_order():
    w, hessian = weight(), second_moment(inputs())
    options = [GptqOptions(groups=groups, ordering="activation") for groups in ("live", "static")]
    one, other = (gptq(w, hessian, AffineFormat(4, 0), o).weight.codes for o in options)
    assert torch.equal(one, other)


# ---- the same every time


def test_equal_calls_give_equal_bits():
    w, hessian = weight(n=300), second_moment(inputs())
    kept = w.clone(), hessian.clone()
    one, other = gptq(w, hessian, AffineFormat(3, 32, False)), gptq(w, hessian, AffineFormat(3, 32, False))
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(one.weight, name), getattr(other.weight, name))
    assert (one.loss_before, one.loss_after) == (other.loss_before, other.loss_after)
    assert torch.equal(w, kept[0]) and torch.equal(hessian, kept[1])


def test_another_number_of_threads_turns_ties_at_most():
    w, hessian = weight(n=300), second_moment(inputs())
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gptq(w, hessian, AffineFormat(4, 32)))
    finally:
        torch.set_num_threads(threads)
    assert results[0].loss_after == pytest.approx(results[1].loss_after, rel=1e-3)


def test_float32_is_as_good_as_float64():
    w, x = weight(), inputs()
    one = gptq(w, second_moment(x).float(), AffineFormat(4, 32))
    other = gptq(w, second_moment(x), AffineFormat(4, 32), GptqOptions(dtype=torch.float64))
    assert one.loss_after == pytest.approx(other.loss_after, rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_the_whole_matrix(symmetric):
    w, hessian = weight(), second_moment(inputs())
    result = gptq(w, hessian, AffineFormat(8, 0, symmetric), per_tensor=True)
    assert result.weight.scales.shape == (24, 1) and result.weight.scales.unique().numel() == 1
    assert result.fallback is None and result.loss_after < 0.5 * result.loss_before


# ---- asymmetric calibration


@pytest.mark.parametrize("correction", ["channel", "target"])
@pytest.mark.parametrize("mode", MODES)
def test_without_a_difference_of_streams_it_is_gptq_bit_for_bit(mode, correction):
    w, hessian = weight(), second_moment(inputs())
    options = replace(MODES[mode], correction=correction)
    plain = gptq(w, hessian, AffineFormat(4, 32), options)
    mixed = gptq(w, hessian, AffineFormat(4, 32), options, cross=torch.zeros(160, 160))
    assert torch.equal(plain.weight.codes, mixed.weight.codes) and torch.equal(plain.weight.scales, mixed.weight.scales)


@pytest.mark.parametrize("correction", ["channel", "target"])
def test_asymmetric_calibration_comes_closer_to_the_float_layer(correction):
    """‖W̃ X − W X̃‖² on average over problems, and `loss_after` is what of it depends on W̃."""
    total = {"plain": 0.0, "asymmetric": 0.0}
    for seed in range(5):
        w, clean = weight(seed=seed), inputs(seed=seed, tokens=1500).double()
        noise = torch.randn(160, 160, generator=torch.Generator().manual_seed(seed)).double() / 160**0.5
        x = clean + 0.15 * clean @ noise
        hessian, cross = second_moment(x), second_moment(x, clean)
        error = lambda solved, x=x, clean=clean, w=w: (  # noqa: E731
            (x @ solved.dequantize().double().T - clean @ w.double().T).square().sum(1).mean().item()
        )
        options = GptqOptions(correction=correction)
        plain = gptq(w, hessian, AffineFormat(4, 32), options)
        mixed = gptq(w, hessian, AffineFormat(4, 32), options, cross=cross)
        total["plain"] += error(plain.weight)
        total["asymmetric"] += error(mixed.weight)
        constant = ((x - clean) @ w.double().T).square().sum(1).mean().item()
        assert mixed.loss_after + constant == pytest.approx(error(mixed.weight), rel=1e-3)
        assert mixed.fallback is None and mixed.loss_after < mixed.loss_before
    assert total["asymmetric"] < 0.9 * total["plain"]
