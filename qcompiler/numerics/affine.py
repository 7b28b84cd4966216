"""Affine quantization of weights: x̃ = S · (q − Z), q = clamp(round(x / S) + Z), round half to even (as ONNX defines it)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from qcompiler.ops.formats import AffineFormat

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a scale never underflows to 0 under a weight that is not
LARGEST_SCALE = 65504.0

CHUNK = 2**17  # elements that are fitted at once: the search goes over them 31 times, from the processor's cache

# Factors on the min-max range that the MSE search tries; 1 is among them, so the search never loses to min-max.
SHRINK = torch.linspace(1.0, 0.4, 31, dtype=torch.float64)
COARSE = SHRINK[::3]  # where a search is repeated: it finds nearly the same in a third of the time


@dataclass(frozen=True)
class AffineWeight:
    """A quantized matrix, or one for each of many experts: then every tensor has their axis before its own.

    Attributes:
        codes: `[n, k]`, int8 for 8 bits, uint8 below.
        scales: float16 `[n, groups]`.
        zeros: `[n, groups]` of the dtype of `codes`, or None when symmetric.
        format: bits, group, symmetric.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: AffineFormat

    def dequantize(self, rows: slice = slice(None)) -> torch.Tensor:
        """W = S · (q − Z), float32 `[n, k]`, or some of its rows (of many experts: some of them)."""
        k = self.codes.shape[-1]
        width = self.format.group or k
        spread = lambda t: t[rows].float().repeat_interleave(width, dim=-1)[..., :k]  # noqa: E731
        centre = self.format.center if self.zeros is None else spread(self.zeros)
        return (self.codes[rows].float() - centre) * spread(self.scales)


def scale_and_zero(low: torch.Tensor, high: torch.Tensor, format: AffineFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that cover `[low, high]`, widened to contain 0 so that 0 is exact.

    Args:
        low, high: bounds, any one shape, float.
        format: asymmetric: S = (high − low) / (2^b − 1), Z = round(q_min − low / S); symmetric: S = max(|low|, |high|) /
            (2^(b-1) − 1), Z fixed. A range of a single point gets S = 1.

    Returns:
        `(S, Z)` of the shape of `low`; Z holds integers as float.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    code_low, code_high = format.code_range
    if format.symmetric:
        scale = torch.maximum(-low, high) / (2 ** (format.bits - 1) - 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, torch.full_like(scale, format.center)
    scale = (high - low) / (code_high - code_low)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, zero_point(low, scale, format)


def zero_point(low: torch.Tensor, scale: torch.Tensor, format: AffineFormat) -> torch.Tensor:
    """Z = clamp(round(q_min − low / S)): the integer that stands for 0 when `low` is the smallest value."""
    code_low, code_high = format.code_range
    return torch.round(code_low - low / scale).clamp(code_low, code_high)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, format: AffineFormat) -> torch.Tensor:
    """q = clamp(round(x / S) + Z), as float; symmetric 8 bits use [−127, 127]."""
    return (torch.round(x / scale) + zero).clamp(*rounding_range(format))


def rounding_range(format: AffineFormat) -> tuple[int, int]:
    """Smallest and largest code that rounding produces."""
    low, high = format.code_range
    return (-127, high) if format.bits == 8 and format.symmetric else (low, high)


def _to_half(scale: torch.Tensor) -> torch.Tensor:
    """The scale as stored: rounded to float16, never to 0."""
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def _grouped(weight: torch.Tensor, format: AffineFormat) -> torch.Tensor:
    """`[n, k]` -> `[n, groups, width]`; a short last group repeats its last column, which changes no range."""
    n, k = weight.shape
    width = format.group or k
    short = format.groups(k) * width - k
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(n, short)], dim=1)
    return weight.reshape(n, -1, width)


def fit(
    weight: torch.Tensor,
    format: AffineFormat,
    clipping: str = "mse",
    norm: float = 2.0,
    per_tensor: bool = False,
    importance: torch.Tensor | None = None,
    factors: torch.Tensor = SHRINK,
) -> AffineWeight:
    """Round to nearest with a chosen clipping range a group.

    The grid of a symmetric format of few bits has one code more below zero than above. With `mse` each group is turned so
    that its largest element lies on that side: S takes the sign that does it. (`minmax` keeps S > 0.)

    Args:
        weight: float `[n, k]`, finite.
        format: of the result.
        clipping: `minmax`, or `mse`: the factor of `SHRINK` on the range that makes Σ |w − w̃|^norm least, a group each,
            with the scale already rounded to float16.
        norm: exponent of the search.
        per_tensor: one scale (and zero point) for the whole matrix, stored with every row; the format's group is 0.
        importance: float `[k]`, not negative: what the error of a column counts in the search; all alike when None.
        factors: that the search tries, 1 first.

    Raises:
        ValueError: a range whose scale float16 cannot hold.
    """
    n, k = weight.shape
    dtype = torch.int8 if format.bits == 8 else torch.uint8
    if per_tensor:
        importance = None if importance is None else importance.repeat(n)
        codes, scale, zero = _fit_rows(weight.float().reshape(1, -1), format, clipping, norm, importance, factors)
        zeros = None if format.symmetric else zero.to(dtype).expand(n, 1).contiguous()
        return AffineWeight(codes.reshape(n, k).to(dtype), scale.half().expand(n, 1).contiguous(), zeros, format)
    parts = []
    for rows in _chunks(weight):
        codes, scales, zeros = _fit_rows(rows.float(), format, clipping, norm, importance, factors)
        parts.append((codes.to(dtype), scales, zeros))  # a byte a code: there are as many as weights
    codes = torch.cat([p[0] for p in parts])
    scales = torch.cat([p[1] for p in parts]).half()
    zeros = None if format.symmetric else torch.cat([p[2] for p in parts]).to(dtype)
    return AffineWeight(codes, scales, zeros, format)


def fit_group(
    group: torch.Tensor,
    format: AffineFormat,
    clipping: str = "mse",
    norm: float = 2.0,
    importance: torch.Tensor | None = None,
    factors: torch.Tensor = SHRINK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of one group of columns, by the rules of `fit`.

    Args:
        group: float `[n, width]`, finite; any width, `format.group` is not looked at.
        importance: float `[width]`, and `factors`: as in `fit`.

    Returns:
        `(S, Z)`, float32 `[n]` each: S as float16 stores it, Z an integer.

    Raises:
        ValueError: as `fit`.
    """
    importance = None if importance is None else importance.float()[None]
    parts = [_fit_grids(rows.float()[:, None], format, clipping, norm, importance, factors) for rows in _chunks(group)]
    return torch.cat([p[0] for p in parts])[:, 0], torch.cat([p[1] for p in parts])[:, 0]


def _chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows in pieces of `CHUNK` elements; an accelerator has no cache to stay in, and takes larger ones."""
    size = CHUNK if weight.device.type == "cpu" else 512 * CHUNK
    return weight.split(max(1, size // max(weight.shape[1], 1)))


def _fit_rows(
    weight: torch.Tensor,
    format: AffineFormat,
    clipping: str,
    norm: float,
    importance: torch.Tensor | None,
    factors: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Codes `[n, k]`, S and Z `[n, groups]`, all float32."""
    n, k = weight.shape
    w = _grouped(weight, format)
    if w.shape[1] * w.shape[2] > k or importance is not None:  # the repeated columns of a short group do not count
        counted = torch.zeros(w.shape[1] * w.shape[2], dtype=w.dtype, device=w.device)
        counted[:k] = 1 if importance is None else importance
        importance = counted.view(w.shape[1:])
    scale, zero = _fit_grids(w, format, clipping, norm, importance, factors)
    codes = quantize(w, scale[..., None], zero[..., None], format)
    return codes.reshape(n, -1)[:, :k], scale, zero


def _fit_grids(
    w: torch.Tensor,
    format: AffineFormat,
    clipping: str,
    norm: float,
    importance: torch.Tensor | None,
    factors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(S, Z)` `[n, groups]` for `w` `[n, groups, width]`, with `importance` `[groups, width]` or None."""
    low, high = w.amin(dim=2).clamp(max=0), w.amax(dim=2).clamp(min=0)
    turn = torch.ones_like(low)
    if clipping == "mse" and format.symmetric and format.bits < 8:
        turn = torch.where(high > -low, -turn, turn)
        w = w * turn[..., None]

    if clipping not in ("mse", "minmax"):
        raise ValueError(f"clipping must be 'minmax' or 'mse', got {clipping!r}")
    # All candidates at once, `[factors, n, groups]`: they are small, and the steps to them many.
    tried = (factors if clipping == "mse" else factors[:1]).to(w.dtype).to(w.device)[:, None, None]
    scales = _to_half(scale_and_zero(low * tried, high * tried, format)[0])
    zeros = torch.full_like(scales, format.center) if format.symmetric else zero_point(low * tried, scales, format)
    if not torch.isfinite(scales[0]).all():
        raise ValueError(f"a group has a range of {float((high - low).max()):.3g}; float16 scales hold at most {LARGEST_SCALE:g}")
    if len(tried) == 1:
        return scales[0] * turn, zeros[0]
    buffer = torch.empty_like(w)
    errors = [_error(w, s, z, format, importance, norm, buffer) for s, z in zip(scales, zeros, strict=True)]
    best = torch.stack(errors).argmin(0, keepdim=True)  # the first of equals: the least clipped
    scale, zero = scales.gather(0, best)[0], zeros.gather(0, best)[0]
    return scale * turn, zero


def _error(w, scale, zero, format, importance, norm, buffer) -> torch.Tensor:
    """Σ |w − w̃|^norm a group; `buffer`, of the shape of `w`, is overwritten. The arithmetic is that of `quantize`."""
    code_low, code_high = rounding_range(format)
    scale = scale[..., None]
    difference = torch.div(w, scale, out=buffer).round_()
    if format.symmetric:  # Z is one number: q − Z without adding and subtracting it
        difference = difference.clamp_(code_low - format.center, code_high - format.center)
    else:
        zero = zero[..., None]
        difference = difference.add_(zero).clamp_(code_low, code_high).sub_(zero)
    difference = difference.mul_(scale).sub_(w)
    difference = difference.square_() if norm == 2.0 else difference.abs_().pow_(norm)
    if importance is not None:
        difference = difference.mul_(importance)
    return difference.sum(dim=2)


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """10·log10(Σ reference² / Σ (reference − approximation)²); infinite when equal."""
    signal = noise = 0.0
    # in pieces: float64 copies of a large weight would take several times its memory
    for x, y in zip(reference.reshape(-1).split(CHUNK), approximation.reshape(-1).split(CHUNK), strict=True):
        signal += x.double().square().sum().item()
        noise += (x.double() - y).square().sum().item()
    return decibel(signal, noise)


class Dequantizable(Protocol):
    """A quantized matrix of whatever kind."""

    def dequantize(self, rows: slice = slice(None), /) -> torch.Tensor:
        """Float32 `[n, k]`, or some rows."""


def weight_sqnr_db(weight: torch.Tensor, solution: Dequantizable) -> float:
    """`sqnr_db(weight, solution.dequantize())`, a few rows at a time."""
    signal = noise = 0.0
    step = max(1, CHUNK // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        x = weight[rows].double()
        signal += x.square().sum().item()
        noise += (x - solution.dequantize(rows)).square().sum().item()
    return decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """10·log10(signal / noise); infinite without noise, minus infinity without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
