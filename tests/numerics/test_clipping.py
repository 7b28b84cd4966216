"""The clip search: its error is the output's, no group is worse than unclipped, and its statistics are what they say."""

from __future__ import annotations

import itertools

import pytest
import torch

from qcompiler.numerics import affine
from qcompiler.numerics.clipping import FACTORS, BlockHessian, fit_clipped
from qcompiler.ops.formats import AffineFormat

K = 72  # groups of 32: the last has 8 columns
FORMATS = [AffineFormat(bits, group, symmetric) for bits in (8, 4, 3) for group in (32, 0) for symmetric in (True, False)]
formats = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of heavy tails with rows of one sign, and correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, K, generator=generator) ** 3
    weight[1], weight[2], weight[3] = weight[1].abs(), -weight[2].abs(), 0
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, K, generator=generator)
    return weight, (x + 0.3 * torch.randn(400, K, generator=generator)) * torch.logspace(-1, 1, K)


def blocks(x: torch.Tensor, width: int) -> torch.Tensor:
    reducer = BlockHessian(K, width)
    for part in x.split(37):
        reducer.update(part)
    return reducer.result()


def group_errors(weight: torch.Tensor, dequantized: torch.Tensor, x: torch.Tensor, width: int) -> torch.Tensor:
    """Mean over tokens of each group's squared output error, float64 `[n, groups]`, by its definition."""
    d = (weight.double() - dequantized.double()).split(width, dim=1)
    results = [part @ inputs.double().T for part, inputs in zip(d, x.split(width, dim=1), strict=True)]
    return torch.stack([result.square().mean(dim=1) for result in results], dim=1)


def test_blocks_are_those_of_the_second_moment():
    _, x = problem()
    whole = x.double().T @ x.double() / len(x)
    found = blocks(x, 32)
    assert found.shape == (3, 32, 32)
    for index, start in enumerate((0, 32, 64)):
        size = min(32, K - start)
        expected = whole[start : start + size, start : start + size].float()
        assert torch.allclose(found[index, :size, :size], expected, rtol=1e-4, atol=1e-4)
        assert not found[index, size:].any() and not found[index, :, size:].any()
    assert torch.allclose(blocks(x, K)[0], whole.float(), rtol=1e-4, atol=1e-3)


@formats
def test_errors_are_the_outputs_and_no_group_is_worse_than_unclipped(format):
    weight, x = problem()
    width = format.group or K
    found = fit_clipped(weight, format, blocks(x, width))
    errors = group_errors(weight, found.weight.dequantize(), x, width)
    assert found.error_after == pytest.approx(errors.sum().item(), rel=1e-3)
    # factor 1 alone: no statistics make clipping pay
    plain = fit_clipped(weight, format, torch.zeros(format.groups(K), width, width))
    assert (plain.factors == 1).all()
    unclipped = group_errors(weight, plain.weight.dequantize(), x, width)
    assert found.error_before == pytest.approx(unclipped.sum().item(), rel=1e-3)
    assert (errors <= unclipped * (1 + 1e-4) + 1e-9).all()
    signal = group_errors(weight, torch.zeros_like(weight), x, width)
    assert found.signal == pytest.approx(signal.sum().item(), rel=1e-3)
    if format.bits < 8:
        assert (found.factors < 1).any() and found.error_after < 0.95 * found.error_before


@formats
def test_the_factor_is_the_best_of_the_grid(format):
    """Every group against every factor, one at a time."""
    weight, x = problem(1)
    width = format.group or K
    moments = blocks(x, width)
    found = fit_clipped(weight, format, moments)
    parts = weight.split(width, dim=1)
    for row, group in itertools.product((0, 1, 2, 5), range(format.groups(K))):
        w = parts[group][row]
        low, high = w.min().clamp(max=0), w.max().clamp(min=0)
        turn = -1 if format.symmetric and format.bits < 8 and high > -low else 1
        h = moments[group, : len(w), : len(w)]
        errors = []
        for factor in FACTORS:
            ends = sorted((turn * low * factor, turn * high * factor))
            scale, _ = affine.scale_and_zero(*ends, format)
            scale = scale.half().float()
            zero = torch.tensor(float(format.center)) if format.symmetric else affine.zero_point(ends[0], scale, format)
            d = turn * w - scale * (affine.quantize(turn * w, scale, zero, format) - zero)
            errors.append(float(d @ h @ d))
        chosen = errors[FACTORS.index(min(FACTORS, key=lambda f: abs(f - found.factors[row, group].item())))]
        assert chosen <= min(errors) * (1 + 1e-4) + 1e-9


@formats
def test_what_it_returns_is_a_weight_of_the_format(format):
    weight, x = problem()
    found = fit_clipped(weight, format, blocks(x, format.group or K)).weight
    assert found.codes.shape == (12, K) and found.scales.shape == (12, format.groups(K))
    assert found.codes.dtype == (torch.int8 if format.bits == 8 else torch.uint8) and found.scales.dtype == torch.float16
    low, high = affine.rounding_range(format)
    assert low <= found.codes.int().min() and found.codes.int().max() <= high
    assert (found.zeros is None) == format.symmetric
    assert not found.dequantize()[3].any()  # a row of zeros stays one
    # unclipped, it is what minmax gives, up to the turn of the grid
    if not format.symmetric or format.bits == 8:
        plain = fit_clipped(weight, format, torch.zeros(format.groups(K), *[format.group or K] * 2)).weight
        assert torch.equal(plain.codes, affine.fit(weight, format, "minmax").codes)


def test_chunks_do_not_show(monkeypatch):
    weight, x = problem()
    format, moments = AffineFormat(4, 32), blocks(x, 32)
    whole = fit_clipped(weight, format, moments)
    monkeypatch.setattr("qcompiler.numerics.clipping.CHUNK", 3 * K)
    parts = fit_clipped(weight, format, moments)
    assert torch.equal(whole.weight.codes, parts.weight.codes) and torch.equal(whole.factors, parts.factors)


def test_refusals():
    weight, x = problem()
    with pytest.raises(ValueError, match=r"second moments are \[3, 32, 32\], expected \[1, 72, 72\]"):
        fit_clipped(weight, AffineFormat(4, 0), blocks(x, 32))
    with pytest.raises(ValueError, match="float16 scales hold at most 65504"):
        fit_clipped(weight * 1e7, AffineFormat(4, 32), blocks(x, 32))
