"""The sweep against its definition: exact identities, OBQ, and what may not change its result."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics import affine, gptaq
from qcompiler.numerics import gptq as solver
from qcompiler.numerics.damping import Factor, factorise
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.hessian import layer_loss, second_moment
from qcompiler.numerics.ordering import order_columns
from qcompiler.numerics.sweep import Grids, Swept, damped_losses, sweep
from qcompiler.ops.formats import BITS, AffineFormat
from tests.oracles.obq import obq

F64 = torch.float64
FORMATS = [AffineFormat(bits, group, symmetric) for bits in BITS for group in (0, 32) for symmetric in (True, False)]
label = lambda format: format.label  # noqa: E731


def problem(n=16, k=80, tokens=300, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[n, k]` that float32 holds, and the second moment of correlated inputs, both float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=F64) * torch.logspace(0, -1.5, k, dtype=F64)[:, None]
    x = torch.randn(tokens, k, generator=generator, dtype=F64) @ mix
    return torch.randn(n, k, generator=generator).double(), second_moment(x)


def factor_of(hessian: torch.Tensor, order=None, damping=0.01) -> Factor:
    found = factorise(hessian, damping, 0.0, order and order.permutation, F64)
    assert isinstance(found, Factor)
    return found


def swept(weight, hessian, format, kind="none", block=32, damping=0.01) -> tuple[Swept, torch.Tensor, Factor]:
    """With min-max grids of the weight; the weight in the sweep's order, transposed."""
    order = order_columns(hessian.diagonal(), kind, format.group, block)
    columns = (weight if order.permutation is None else weight[:, order.permutation]).T.contiguous()
    fitted = affine.fit(weight, format, "minmax")
    scales = fitted.scales.T.to(F64)
    zeros = torch.full_like(scales, format.center) if fitted.zeros is None else fitted.zeros.T.to(F64)
    factor = factor_of(hessian, order, damping)
    return sweep(columns, factor.upper, order, format, Grids(scales, zeros, format)), columns, factor


@pytest.mark.parametrize("kind", ["none", "group_aware", "activation"])
@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_all_errors_together_are_the_difference(format, kind):
    """D = E U and ‖E‖² = tr(D (H + δ) Dᵀ), whatever rounds the columns."""
    weight, hessian = problem()
    result, columns, factor = swept(weight, hessian, format, kind)
    errors = (result.seen - (columns - result.difference)) * factor.upper.diagonal()[:, None]  # (v − w̃) / U_jj
    u = torch.linalg.inv(factor.upper)
    torch.testing.assert_close(result.difference, u.T @ errors, rtol=1e-10, atol=1e-10 * result.difference.abs().max().item())
    order = order_columns(hessian.diagonal(), kind, format.group, 32).permutation
    damped = (hessian if order is None else hessian[order][:, order]) + torch.diag(factor.added)
    expected = ((result.difference.T @ damped) * result.difference.T).sum(1)
    torch.testing.assert_close(errors.square().sum(0), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.losses, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(damped_losses(result.difference, factor.upper, 24), expected, rtol=1e-10, atol=0)


def test_the_factor_is_that_of_the_damped_permuted_hessian():
    _, hessian = problem()
    order = order_columns(hessian.diagonal(), "activation", 0, 32)
    factor = factor_of(hessian, order)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(80, dtype=F64))[order.permutation][:, order.permutation]
    torch.testing.assert_close(factor.upper @ factor.upper.T, damped, rtol=1e-12, atol=1e-12 * damped.max().item())
    assert torch.equal(factor.upper, factor.upper.triu()) and (factor.damping, factor.attempts) == (0.01, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", [AffineFormat(b, g, s) for b in (8, 4, 2) for g in (0, 32) for s in (True, False)], ids=label)
def test_gptq_is_obq_in_the_same_order(format, seed):
    weight, hessian = problem(n=4, k=40, tokens=200, seed=seed)
    for kind in ("none", "activation"):
        result, columns, factor = swept(weight, hessian, format, kind, block=16)
        order = order_columns(hessian.diagonal(), kind, format.group, 16).permutation
        fitted = affine.fit(weight, format, "minmax")

        def rounded(row, column, live, fitted=fitted):
            group = column // (format.group or 40)
            scale = fitted.scales[row, group].double()
            zero = torch.tensor(float(format.center)) if fitted.zeros is None else fitted.zeros[row, group].double()
            return (affine.quantize(live[column], scale, zero, format) - zero) * scale

        natural = list(range(40)) if order is None else order.tolist()
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=F64)
        expected = obq(weight, damped, rounded, natural)[:, natural].T
        found = columns - result.difference
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # steps are far larger: the codes are equal


@pytest.mark.parametrize("kind", ["none", "group_aware"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 40, 80, 200])
def test_live_grids_are_those_that_obq_finds_when_it_reaches_the_group(block, symmetric, kind):
    """In a block of several groups too: the columns of a group have all that those before it fed forward."""
    format = AffineFormat(4, 32, symmetric)
    weight, hessian = problem(n=3, k=80)
    options = GptqOptions(
        block=block, passes=1, groups="live", ordering=kind, clipping="mse", importance="uniform", dtype=F64, compare=False
    )
    result = gptq(weight, hessian, format, options).weight
    grids: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    permutation = order_columns(hessian.diagonal(), kind, 32, block).permutation
    natural = list(range(80)) if permutation is None else permutation.tolist()

    def rounded(row, column, live):
        key = (row, column // 32)
        if key not in grids:
            members = [j for j in natural if j // 32 == column // 32]
            scale, zero = affine.fit_group(live[members][None], format)
            grids[key] = scale[0].double(), zero[0].double()
        scale, zero = grids[key]
        return (affine.quantize(live[column], scale, zero, format) - zero) * scale

    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(80, dtype=F64)
    expected = obq(weight, damped, rounded, natural)
    torch.testing.assert_close(result.dequantize().double(), expected, rtol=1e-5, atol=1e-5)
    assert all(result.scales[row, group] == scale for (row, group), (scale, _) in grids.items())


def test_the_oracle_beats_rounding_in_its_greedy_and_in_a_fixed_order():
    weight, hessian = problem(n=12, k=20)
    format = AffineFormat(3, 0)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20, dtype=F64)
    fitted = affine.fit(weight, format)
    rounded = lambda row, column, live: (  # noqa: E731
        affine.quantize(live[column], fitted.scales[row, 0].double(), torch.tensor(4.0), format) - 4
    ) * fitted.scales[row, 0].double()
    nearest = layer_loss(weight, fitted.dequantize(), damped)
    losses = [layer_loss(weight, obq(weight, damped, rounded, order), damped) for order in (None, list(range(20)))]
    assert losses[0] < nearest and losses[1] < nearest


def test_blocks_change_nothing_but_rounding():
    weight, hessian = problem(n=8, k=150)
    for format in (AffineFormat(4, 32, False), AffineFormat(3, 0), AffineFormat(4, 128)):
        for groups, kind in (("live", "none"), ("live", "group_aware"), ("static", "activation")):
            options = [
                GptqOptions(block=block, groups=groups, ordering=kind, passes=2, dtype=F64) for block in (1, 32, 100, 1000)
            ]
            codes = [gptq(weight, hessian, format, o).weight.codes for o in options]
            assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_columns_in_another_order_are_solved_alike():
    """With static grids of whole rows, columns and H permuted together give permuted codes."""
    weight, hessian = problem()
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    format = AffineFormat(4, 0, False)
    one = gptq(weight, hessian, format, GptqOptions(ordering="activation", dtype=F64))
    other = gptq(weight[:, shuffled], hessian[shuffled][:, shuffled], format, GptqOptions(ordering="activation", dtype=F64))
    assert torch.equal(one.weight.codes[:, shuffled], other.weight.codes)
    assert one.loss_after == pytest.approx(other.loss_after, rel=1e-9)


def test_rows_know_nothing_of_each_other(monkeypatch):
    weight, hessian = problem()
    whole = gptq(weight, hessian, AffineFormat(4, 32), GptqOptions(dtype=F64)).weight
    monkeypatch.setattr(solver, "ROWS", 7)
    pieces = gptq(weight, hessian, AffineFormat(4, 32), GptqOptions(dtype=F64))
    assert torch.equal(whole.codes, pieces.weight.codes) and torch.equal(whole.scales, pieces.weight.scales)
    assert pieces.loss_after == pytest.approx(layer_loss(weight, whole.dequantize(), hessian), rel=1e-6)
    half = gptq(weight[5:9], hessian, AffineFormat(4, 32), GptqOptions(dtype=F64)).weight
    assert torch.equal(whole.codes[5:9], half.codes) and torch.equal(whole.scales[5:9], half.scales)


def test_orders():
    diagonal = torch.tensor([1.0, 5, 2, 9, 9, 3, 7])
    assert order_columns(diagonal, "none", 3, 4).permutation is None
    assert order_columns(diagonal, "activation", 3, 4).permutation.tolist() == [3, 4, 6, 1, 5, 2, 0]
    aware = order_columns(diagonal, "group_aware", 3, 4)
    assert aware.permutation.tolist() == [3, 4, 5, 6, 1, 2, 0]  # the short group, columns 6, is second
    assert aware.begins == {0: 3, 3: 4, 4: 7} and [(b.start, b.stop) for b in aware.blocks] == [(0, 4), (4, 7)]
    with pytest.raises(ValueError, match="'none', 'activation' or 'group_aware', got 'best'"):
        order_columns(diagonal, "best", 3, 4)


def test_group_aware_is_the_natural_order_where_that_is_sorted():
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    for groups in ("live", "static"):
        one, other = (
            gptq(weight, hessian, AffineFormat(4, 32), GptqOptions(groups=groups, ordering=kind)).weight
            for kind in ("none", "group_aware")
        )
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def test_mixing_is_what_the_columns_left_can_take_over():
    """Row j of P is C[j, F] H_F⁻¹ over the columns F after j."""
    _, hessian = problem(k=12)
    cross = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=F64)
    factor = factor_of(hessian)
    damped = hessian + torch.diag(factor.added)
    found = gptaq.mixing(cross, factor.upper)
    for j in range(11):
        expected = cross[j, j + 1 :] @ torch.linalg.inv(damped[j + 1 :, j + 1 :])
        torch.testing.assert_close(found[j, j + 1 :], expected, rtol=1e-8, atol=1e-8)
    assert (found.tril() == 0).all()


def test_target_is_the_minimum_of_the_quadratic_form():
    weight, hessian = problem(n=3, k=12)
    cross = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=F64)
    factor = factor_of(hessian)
    found = gptaq.target(weight.T, cross, factor.upper).T
    expected = weight + weight @ cross @ torch.linalg.inv(hessian + torch.diag(factor.added))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
