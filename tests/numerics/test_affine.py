"""Affine quantization: the identities of the definition, and what the search promises."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics import affine
from qcompiler.ops.formats import BITS, AffineFormat

FORMATS = [AffineFormat(bits, group, symmetric) for bits in BITS for group in (0, 32) for symmetric in (True, False)]
label = lambda format: format.label  # noqa: E731


def weight(n=24, k=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    w[0, 3], w[1] = 9.0, w[1].abs()  # an outlier; a row of one sign
    w[2] = 0
    return w


def test_the_textbook_example():
    """[−1.5, 2.5] in int8: S = 4/255, Z = −32; 0 ↔ −32, 1.0 ↔ 32; what lies beyond saturates."""
    format = AffineFormat(8, 0, symmetric=False)
    scale, zero = affine.scale_and_zero(torch.tensor(-1.5), torch.tensor(2.5), format)
    assert scale.item() == pytest.approx(4 / 255) and zero.item() == -32
    q = affine.quantize(torch.tensor([0.0, 1.0, -7.0, 7.0]), scale, zero, format)
    assert q.tolist() == [-32, 32, -128, 127]
    assert (scale * (q[0] - zero)).item() == 0


@pytest.mark.parametrize("format", FORMATS, ids=label)
@pytest.mark.parametrize("clipping", ["minmax", "mse"])
def test_dequantized_values_are_fixed_points(format, clipping):
    fitted = affine.fit(weight(), format, clipping)
    groups = fitted.scales.float().repeat_interleave(format.group or 200, 1)[:, :200]
    zeros = (
        format.center
        if fitted.zeros is None
        else fitted.zeros.float().repeat_interleave(format.group or 200, 1)[:, :200]
    )
    again = affine.quantize(fitted.dequantize(), groups, torch.as_tensor(zeros), format)
    assert torch.equal(again, fitted.codes.float())


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_minmax_error_is_at_most_half_a_step(format):
    w = weight()
    fitted = affine.fit(w, format, "minmax")
    step = fitted.scales.float().abs().repeat_interleave(format.group or 200, 1)[:, :200]
    # the zero point is an integer: the range may shift by half a step, and the scale is rounded to float16
    slack = (1.0 if not format.symmetric else 0.5) + 2 ** (format.bits - 11) * 2
    assert ((w - fitted.dequantize()).abs() <= slack * step + 1e-7).all()


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_zero_is_exact(format):
    w = weight()
    w[:, ::7] = 0
    for clipping in ("minmax", "mse"):
        assert (affine.fit(w, format, clipping).dequantize()[:, ::7] == 0).all()


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_mse_never_loses_to_minmax_in_any_group(format):
    w = weight()
    if format.symmetric and format.bits < 8:
        w = -w.abs()  # the turned grid and the plain one agree where the largest element is negative
    width = format.group or 200
    errors = {}
    for clipping in ("minmax", "mse"):
        difference = (w - affine.fit(w, format, clipping).dequantize()).square()
        errors[clipping] = torch.stack([part.sum(1) for part in difference.split(width, dim=1)])
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5) + 1e-12).all()


def test_finer_is_better():
    w = weight()
    error = lambda format: (w - affine.fit(w, format, "minmax").dequantize()).square().sum()  # noqa: E731
    for bits in BITS:
        assert error(AffineFormat(bits, 32)) <= error(AffineFormat(bits, 128)) <= error(AffineFormat(bits, 0))
    for more, fewer in zip(BITS, BITS[1:], strict=False):
        assert error(AffineFormat(more, 32)) < error(AffineFormat(fewer, 32))


@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_rounding_is_monotone(format):
    w = torch.linspace(-3, 5, 200)[None]
    fitted = affine.fit(w, AffineFormat(format.bits, 0, format.symmetric), "minmax")
    assert (fitted.codes.int().diff(dim=1) >= 0).all()


def test_a_short_last_group_is_fitted_by_its_own_columns():
    w = torch.randn(4, 70, generator=torch.Generator().manual_seed(1))
    w[:, 64:] *= 100
    for clipping in ("minmax", "mse"):
        fitted = affine.fit(w, AffineFormat(4, 32), clipping)
        assert fitted.scales.shape == (4, 3)
        alone = affine.fit(w[:, 64:].contiguous(), AffineFormat(4, 32), clipping)
        assert torch.equal(fitted.codes[:, 64:], alone.codes) and torch.equal(fitted.scales[:, 2:], alone.scales)


def test_tiny_weights_keep_a_scale_and_huge_ones_are_refused():
    tiny = torch.full((1, 32), 1e-9)
    assert (affine.fit(tiny, AffineFormat(4, 32)).scales != 0).all()
    with pytest.raises(ValueError, match="float16 scales hold at most 65504"):
        affine.fit(torch.full((1, 32), 1e7), AffineFormat(4, 32))


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert affine.sqnr_db(x, x) == float("inf")
    assert affine.sqnr_db(x, x * 0.9) == pytest.approx(20)


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_tensor_has_one_scale_for_all_rows(symmetric):
    w = weight()
    fitted = affine.fit(w, AffineFormat(8, 0, symmetric), "minmax", per_tensor=True)
    assert fitted.scales.shape == (24, 1) and fitted.scales.unique().numel() == 1
    row = affine.fit(w, AffineFormat(8, 0, symmetric), "minmax")
    error = lambda f: (w - f.dequantize()).square().sum()  # noqa: E731
    assert error(row) <= error(fitted)
    assert ((w - fitted.dequantize()).abs() <= 0.51 * 2 * fitted.scales.float()).all()
