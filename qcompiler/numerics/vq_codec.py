"""Codebooks and scales as they are stored: what rounds them, and what a solver's values stand for.

A solver works on W / unit, unit a power of two near the weights' root mean square. The power is shared out between the
stored scales and the stored codebooks' scales, so that weights may be as small as the product of two float16 numbers is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qcompiler.numerics import vq_tables
from qcompiler.numerics.vq_shape import VqShape

INT4_STEPS = torch.linspace(1.0, 0.6, 17, dtype=torch.float64)  # of 4-bit entries: the largest may be clipped
LOG_LEVELS = 15


@dataclass(frozen=True)
class Codec:
    """How values become stored values.

    Attributes:
        shape: of the weight.
        scale_unit, codebook_unit: powers of two: a stored scale is S · scale_unit, a stored codebook scale c · codebook_unit.
        table: fixed codes `[K, d]` and step, or None.
    """

    shape: VqShape
    scale_unit: float
    codebook_unit: float
    table: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, shape: VqShape, weight: torch.Tensor, table: torch.Tensor | None) -> Codec:
        power = weight.float().square().mean().item()
        exponent = round(math.log2(power) / 2) if power > 0 and math.isfinite(power) else 0
        if table is not None:
            codes, step = vq_tables.entries(table.to(weight.device))
            return cls(shape, 2.0**exponent, 1.0, (codes, step))
        if shape.scales != "fp16":
            return cls(shape, 1.0, 2.0**exponent)
        own = (exponent + 5) // 2  # a codebook's scale is about 2^-5 of the largest entry's unit
        return cls(shape, 2.0 ** (exponent - own), 2.0**own)

    @property
    def unit(self) -> float:
        return self.scale_unit * self.codebook_unit

    def scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as stored; never infinite."""
        if self.shape.scales != "fp16":
            return scales
        return _half(scales, self.scale_unit)

    def codebooks(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries `[G, K, d]` as stored: codes, of the same type, and steps `[G]`; a value is their product."""
        kind = self.shape.codebooks
        if kind in ("fp16", "svd"):
            return _half(entries, self.codebook_unit), entries.new_ones(len(entries))
        low, high = entries.amin((1, 2)), entries.amax((1, 2))
        top = 127 if kind == "int8" else 7
        step = torch.maximum(high / top, -low / (top + 1))
        step = torch.where(step > 0, step, 1.0)
        if kind == "int4":
            step = self._searched(entries, step)
        step = _half(step, self.codebook_unit, positive=True)
        return (entries / step[:, None, None]).round().clamp(-top - 1, top), step

    def _searched(self, entries: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        tried = INT4_STEPS.to(entries)[:, None] * largest
        codes = (entries / tried[..., None, None]).round().clamp(-8, 7)
        errors = (codes * tried[..., None, None] - entries).square().sum((2, 3))
        return tried.gather(0, errors.argmin(0, keepdim=True))[0]


def _half(values: torch.Tensor, unit: float, positive: bool = False) -> torch.Tensor:
    """`values` · unit rounded to float16, / unit. With `positive` never to 0."""
    stored = (values * unit).clamp(-65504, 65504)
    if positive:
        stored = stored.clamp(min=2.0**-24)
    return stored.half().to(values.dtype) / unit


def log_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales `[groups, n]` as 4 bits of logarithm hold them: 16 values at equal ratios from the least to the largest.

    Zeros stay: they belong to rows of padding, or to weights that are all 0.
    """
    logs = torch.where(scales > 0, scales, 1.0).log2()
    low = torch.where(scales > 0, logs, torch.inf).amin(1, keepdim=True)
    high = torch.where(scales > 0, logs, -torch.inf).amax(1, keepdim=True)
    step = (high - low) / LOG_LEVELS
    step = torch.where(torch.isfinite(step) & (step > 0), step, 1.0)
    low = torch.where(torch.isfinite(low), low, 0.0)
    codes = ((logs - low) / step).round().clamp(0, LOG_LEVELS)
    values = torch.exp2(low + torch.arange(LOG_LEVELS + 1, device=scales.device) * step)
    return torch.where(scales > 0, values.gather(1, codes.long()), 0.0)
