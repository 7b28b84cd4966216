"""Which factor a channel makes a group of quantized products lose least: AWQ's search and SmoothQuant's rule.

Both write W x as (W · diag(s)) (diag(1/s) · x), which is exact in float; rounding W · diag(s) and x / s is what s changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompiler.numerics import affine
from qcompiler.numerics.hessian import layer_loss
from qcompiler.numerics.straight_through import fake_activations
from qcompiler.ops.formats import Activation, AffineFormat

SMALLEST = 1e-5  # of maxima and of s in SmoothQuant
SMALLEST_AWQ = 1e-4  # of s in AWQ, before it is centred


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads the scaled channels.

    Attributes:
        weight: float32 `[m, k]`, all of its rows or a sample of them.
        channels: int64 `[k]`: which s multiplies each column.
        format: of its quantization.
        per_tensor: one scale for the whole matrix.
        clipping: `minmax` or `mse`, as in `affine.fit`; or `output`: the error of a column counts E[x²] times.
        share: rows in all for each row held: what its loss counts.
        activation: what its input becomes.
    """

    weight: torch.Tensor
    channels: torch.Tensor
    format: AffineFormat
    per_tensor: bool = False
    clipping: str = "mse"
    share: float = 1.0
    activation: Activation = Activation.FLOAT

    def rounded(self, s: torch.Tensor, power: torch.Tensor | None = None) -> torch.Tensor:
        """Q(W · diag(s)), float32 `[m, k]`; `s` float32 `[k]`; `power` E[x²] of the unscaled input, `[k]`."""
        clipping, importance = self.clipping, None
        if clipping == "output" and not self.per_tensor:
            assert power is not None, "rounding for the output needs the inputs' power"
            importance = power.float() / s.square()
        clipping = "mse" if clipping == "output" else clipping
        weight = self.weight * s
        return affine.fit(weight, self.format, clipping, per_tensor=self.per_tensor, importance=importance).dequantize()


def awq_factors(magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """s = a^t, at least 1e-4, divided by √(max · min) (the authors' code); exactly 1 for t = 0.

    Args:
        magnitude: mean |x| a channel, float `[c]`.
        ratio: t.
    """
    s = magnitude.double().pow(ratio).clamp(min=SMALLEST_AWQ)
    return s / (s.max() * s.min()).sqrt()


def expected_error(readers: Sequence[tuple[Reader, torch.Tensor]], s: torch.Tensor) -> float:
    """Σ tr(D H Dᵀ), D = W − Q(W · diag(s)) · diag(1/s): the mean squared error of the outputs, summed over their rows.

    Exact for the tokens that H was gathered from; the error of the activations' own rounding is not in it.

    Args:
        readers: each with H = mean x xᵀ of its input, float32 `[k, k]`, unscaled.
        s: float64 `[c]`.
    """
    total = 0.0
    for reader, hessian in readers:
        columns = s[reader.channels].float()
        rounded = reader.rounded(columns, hessian.diagonal()) / columns
        total += reader.share * layer_loss(reader.weight, rounded, hessian)
    return total


@dataclass(frozen=True, eq=False)
class Found:
    """The outcome of a search.

    Attributes:
        factors: s, float64 `[c]`.
        exponent: the t or alpha that gave it; None where s = 1 was best and is no member of the family.
        before: loss with s = 1.
        after: loss with `factors`; never more than `before`.
    """

    factors: torch.Tensor
    exponent: float | None
    before: float
    after: float


def search_awq(readers: Sequence[tuple[Reader, torch.Tensor]], magnitude: torch.Tensor, steps: int = 20) -> Found:
    """The ratio t of 0, 1/steps, … 1 whose factors lose least; the smaller one where two lose the same.

    The authors' grid ends at 1 − 1/steps; 1 is an addition.
    """
    best: Found | None = None
    before = 0.0
    for step in range(steps + 1):
        s = awq_factors(magnitude, step / steps)
        loss = expected_error(readers, s)
        if best is None:
            before = loss
        if best is None or loss < best.after:
            best = Found(s, step / steps, before, loss)
    assert best is not None
    return best


def smoothing_factors(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = max|x|^α / max|w|^(1−α), both maxima and s at least 1e-5; 1 where a channel of either is all zero.

    Args:
        inputs: max |x| a channel over the calibration tokens, float `[c]`.
        weights: max |w| a channel over every row of every weight that reads it, float `[c]`.
    """
    x, w = (value.double().clamp(min=SMALLEST) for value in (inputs, weights))
    s = (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where((inputs == 0) | (weights == 0), 1.0, s)


def sampled_error(readers: Sequence[tuple[Reader, torch.Tensor]], inputs: torch.Tensor, s: torch.Tensor) -> float:
    """Σ mean ‖W x − Q(W · diag(s)) · x̃‖², x̃ the rounded x / s: mean over the tokens, summed over the outputs.

    Args:
        readers: each with tokens of its input, float32 `[tokens, k]`, unscaled.
        inputs: max |x| a channel over all calibration tokens, float `[c]`: the range of static activations.
        s: float64 `[c]`.
    """
    total = 0.0
    for reader, x in readers:
        columns = s[reader.channels].float()
        static = None
        if reader.activation is Activation.INT8_STATIC:
            largest = float((inputs.double() / s)[reader.channels].max())
            static = (largest / 127 or 1.0, 0)
        rounded = fake_activations(x / columns, reader.activation, static) @ reader.rounded(columns).T
        difference = rounded.sub_(x @ reader.weight.T)
        total += reader.share * float(difference.square_().sum(dtype=torch.float64)) / max(len(x), 1)
    return total


def search_smoothing(
    readers: Sequence[tuple[Reader, torch.Tensor]], inputs: torch.Tensor, weights: torch.Tensor, steps: int = 20
) -> Found:
    """The alpha of 0, 1/steps, … 1 whose factors lose least, or s = 1 where none of them gains anything."""
    one = torch.ones(len(inputs), dtype=torch.float64)
    before = sampled_error(readers, inputs, one)
    best = Found(one, None, before, before)
    for step in range(steps + 1):
        s = smoothing_factors(inputs, weights, step / steps)
        loss = sampled_error(readers, inputs, s)
        if loss < best.after:
            best = Found(s, step / steps, before, loss)
    return best
