"""Clipping ranges by what they do to a layer's output: the range of each group of weights that makes dᵀ H d least.

A group of a row contributes w_g · x_g to the layer's output. With d = w_g − w̃_g and H_gg = E[x_g x_gᵀ] its mean squared error is
dᵀ H_gg d: AWQ's clip search (arXiv 2306.00978) over all tokens instead of 512 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.numerics import affine
from qcompiler.numerics.affine import AffineWeight
from qcompiler.ops.formats import AffineFormat

FACTORS = tuple(1.0 - 0.025 * step for step in range(21))  # 1.0 … 0.5 on the min-max range
CHUNK = 2**21  # weights that are searched at once


class BlockHessian:
    """E[x_g x_gᵀ] of consecutive groups of columns: float32 `[groups, width, width]`, k · width numbers.

    Args:
        k: columns.
        width: of a group; the last may be short and is then padded with columns of zeros.
    """

    def __init__(self, k: int, width: int):
        groups = -(-k // width)
        self._short = groups * width - k
        self._sum = torch.zeros(groups, width, width)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Take `x` float32 `[tokens, k]`."""
        blocks = torch.nn.functional.pad(x.to(self._sum.dtype), (0, self._short))
        blocks = blocks.reshape(x.shape[0], *self._sum.shape[:2]).transpose(0, 1)
        self._sum.baddbmm_(blocks.transpose(1, 2), blocks)
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        return self._sum / max(self.tokens, 1)


@dataclass(frozen=True)
class Clipped:
    """What the search found.

    Attributes:
        weight: the quantized matrix.
        factors: float32 `[n, groups]`: of each group's min-max range.
        error_before, error_after: Σ dᵀ H_gg d over all groups with factor 1, and with these.
        signal: Σ wᵀ H_gg w, what an error is to be compared with.
    """

    weight: AffineWeight
    factors: torch.Tensor
    error_before: float
    error_after: float
    signal: float


def fit_clipped(weight: torch.Tensor, format: AffineFormat, blocks: torch.Tensor) -> Clipped:
    """Round to nearest, the range of each (row, group) times the factor of `FACTORS` that makes dᵀ H_gg d least.

    As in `affine.fit`, the grid of a symmetric format of few bits is turned so that a group's largest element lies on its
    longer side. Factor 1 wins where no other is better.

    Args:
        weight: float `[n, k]`, finite.
        format: of the result.
        blocks: float32 `[groups, width, width]` as `BlockHessian` gives them.

    Raises:
        ValueError: blocks of another shape, or a range whose scale float16 cannot hold.
    """
    n, k = weight.shape
    width, groups = format.group or k, format.groups(k)
    if blocks.shape != (groups, width, width):
        raise ValueError(f"the second moments are {list(blocks.shape)}, expected {[groups, width, width]}")
    parts = [_fit_rows(rows, format, blocks) for rows in weight.split(max(1, CHUNK // max(k, 1)))]
    codes, scales, zeros, factors, *sums = (torch.cat(column, dim=0) for column in zip(*parts, strict=True))
    dtype = torch.int8 if format.bits == 8 else torch.uint8
    fitted = AffineWeight(codes.to(dtype), scales.half(), None if format.symmetric else zeros.to(dtype), format)
    return Clipped(fitted, factors, *(errors.sum(dtype=torch.float64).item() for errors in sums))


def _fit_rows(weight: torch.Tensor, format: AffineFormat, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes `[n, k]`; S, Z, factors, first and least error, signal `[n, groups]`; all float32."""
    n, k = weight.shape
    groups, width, _ = blocks.shape
    # zeros fill a short last group: they widen no range, are exact, and their columns of H are zero
    w = torch.nn.functional.pad(weight.float(), (0, groups * width - k)).reshape(n, groups, width)
    low, high = w.amin(dim=2).clamp(max=0), w.amax(dim=2).clamp(min=0)
    turn = torch.ones_like(low)
    if format.symmetric and format.bits < 8:
        turn = torch.where(high > -low, -turn, turn)
        w = w * turn[..., None]
        low, high = torch.where(turn < 0, -high, low), torch.where(turn < 0, -low, high)
    best: torch.Tensor | None = None
    for factor in FACTORS:
        s, z = _grid(low * factor, high * factor, format)
        d = w - s[..., None] * (affine.quantize(w, s[..., None], z[..., None], format) - z[..., None])
        error = _quadratic(d, blocks)
        if best is None:
            if not torch.isfinite(s).all():
                raise ValueError(f"a group has a range of {float((high - low).max()):.3g}; float16 scales hold at most 65504")
            scale, zero, factors, first, best = s, z, torch.ones_like(s), error, error
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        factors = torch.where(better, factor, factors)
    assert best is not None
    codes = affine.quantize(w, scale[..., None], zero[..., None], format).reshape(n, -1)[:, :k]
    return codes, scale * turn, zero, factors, first, best, _quadratic(w, blocks)


def _grid(low: torch.Tensor, high: torch.Tensor, format: AffineFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """S as float16 stores it, and Z for it."""
    scale, _ = affine.scale_and_zero(low, high, format)
    scale = scale.clamp(min=affine.SMALLEST_SCALE).half().float()
    zero = torch.full_like(scale, format.center) if format.symmetric else affine.zero_point(low, scale, format)
    return scale, zero


def _quadratic(d: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """dᵀ H_gg d: `[n, groups, width]` and `[groups, width, width]` -> `[n, groups]`."""
    d = d.transpose(0, 1)
    return (torch.bmm(d, blocks) * d).sum(dim=2).transpose(0, 1)
