"""Which range static int8 activations cover: estimators that see every token once and keep a fixed number of bytes.

All of them give `(low, high)` with low ≤ 0 ≤ high, so that 0 is a code; symmetric ones give low = −high.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from qcompiler.numerics import affine
from qcompiler.numerics.entropy import entropy_threshold
from qcompiler.numerics.histogram import Histogram, bounds
from qcompiler.ops.formats import AffineFormat

Method = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]

SHRINK = tuple(step / 100 for step in range(100, 19, -1))  # factors on the min-max range that the error search tries
POINTS = 4  # per bin where the error search looks: its smallest step is under two bins


class RangeEstimator(Protocol):
    """Takes activations as they come; `update` is a tap of `Segment.feed`."""

    def update(self, x: torch.Tensor) -> None:
        """Take `x` float32 `[tokens, k]`; ValueError when it holds NaN or infinity."""

    def range(self) -> tuple[float, float]:
        """`(low, high)` of everything seen."""


def _form(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


class MinMax:
    """Smallest and largest number. Independent of the order and the cut of the stream; `merge` is exact."""

    def __init__(self, symmetric: bool = True) -> None:
        self.symmetric = symmetric
        self._low = self._high = 0.0

    def update(self, x: torch.Tensor) -> None:
        if x.numel():
            low, high = bounds(x)
            self._low, self._high = min(self._low, low), max(self._high, high)

    def merge(self, other: MinMax) -> None:
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def range(self) -> tuple[float, float]:
        return _form(self._low, self._high, self.symmetric)


class MovingAverage:
    """Exponential average of every batch's smallest and largest number: e ← e + momentum · (new − e), the first as it is.

    It depends on the order and the cut of the stream by definition, and two of them do not merge.
    """

    def __init__(self, symmetric: bool = True, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.symmetric, self.momentum = symmetric, momentum
        self._held: tuple[float, float] | None = None

    def update(self, x: torch.Tensor) -> None:
        if not x.numel():
            return
        new = bounds(x)
        old = new if self._held is None else self._held
        low, high = (e + self.momentum * (n - e) for e, n in zip(old, new, strict=True))
        self._held = (low, high)

    def range(self) -> tuple[float, float]:
        return _form(*(self._held or (0.0, 0.0)), self.symmetric)


class _Counted:
    """An estimator that needs the distribution: `Histogram`, whose counts depend on the numbers alone."""

    def __init__(self, symmetric: bool = True, bins: int = 2048) -> None:
        if bins < 2048:
            raise ValueError(f"bins must be at least 2048, got {bins}: fewer leave no threshold to choose")
        self.symmetric = symmetric
        self.histogram = Histogram(bins)

    def update(self, x: torch.Tensor) -> None:
        self.histogram.update(x)

    def merge(self, other: _Counted) -> None:
        self.histogram.merge(other.histogram)

    def _within(self, low: float, high: float) -> tuple[float, float]:
        """Not wider than what was seen."""
        return _form(max(low, self.histogram.low), min(high, self.histogram.high), self.symmetric)


class Percentile(_Counted):
    """The range that leaves at most 100 − percentile % of the numbers outside, at most a bin wider than the narrowest.

    Symmetric: of |x|; asymmetric: half of the rest is cut at either end.
    """

    def __init__(self, symmetric: bool = True, bins: int = 2048, percentile: float = 99.999) -> None:
        super().__init__(symmetric, bins)
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile must be in [50, 100], got {percentile}")
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        histogram = self.histogram
        outside = histogram.total * (1 - self.percentile / 100)
        if self.symmetric:
            threshold = _cut(histogram.magnitudes(), outside) * histogram.width
            return self._within(-threshold, threshold)
        high = (_cut(histogram.counts, outside / 2) - histogram.bins) * histogram.width
        low = (histogram.bins - _cut(histogram.counts.flip(0), outside / 2)) * histogram.width
        return self._within(low, high)


def _cut(counts: torch.Tensor, outside: float) -> int:
    """The fewest leading bins beyond which at most `outside` numbers lie."""
    beyond = counts.sum() - counts.cumsum(0)
    return int((beyond > outside).sum()) + 1


class LeastError(_Counted):
    """The range that makes Σ |x − x̃|^norm of int8 least (over the histogram): min-max times a factor of `SHRINK`.

    Asymmetric: a factor for each end, found one after the other, twice. Never worse than min-max.
    """

    def __init__(self, symmetric: bool = True, bins: int = 2048, norm: float = 2.0) -> None:
        super().__init__(symmetric, bins)
        if norm <= 0:
            raise ValueError(f"norm must be above 0, got {norm}")
        self.norm = norm

    def range(self) -> tuple[float, float]:
        histogram = self.histogram
        full = _form(histogram.low, histogram.high, self.symmetric)
        if full == (0.0, 0.0):
            return full
        used = histogram.counts.nonzero().flatten()
        inside = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        points = (used[:, None] - histogram.bins + inside) * histogram.width
        points.clamp_(histogram.low, histogram.high)
        weights = histogram.counts[used].double() / POINTS

        def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
            return min(candidates, key=lambda limits: _error(points, weights, limits, self.symmetric, self.norm))

        if self.symmetric:
            return best([(full[0] * factor, full[1] * factor) for factor in SHRINK])
        found = full
        for _ in range(2):
            found = best([found, *((found[0], full[1] * factor) for factor in SHRINK)])
            found = best([found, *((full[0] * factor, found[1]) for factor in SHRINK)])
        return found


def _error(points: torch.Tensor, weights: torch.Tensor, limits: tuple[float, float], symmetric: bool, norm: float) -> float:
    scale, zero = static_grid(*limits, symmetric)
    low = -127 if symmetric else -128
    # half up, which is several times as fast as half to even: no point of a bin is more exact than that
    rounded = scale * ((points / scale).add_(zero + 0.5).floor_().clamp_(low, 127) - zero)
    return ((points - rounded).abs().pow(norm).sum(dim=1) * weights).sum().item()


class Entropy(_Counted):
    """The range whose 128 levels keep most of the information: the threshold of least KL divergence (see `entropy.py`).

    Asymmetric: the same threshold, not wider on either side than what was seen.
    """

    def range(self) -> tuple[float, float]:
        threshold = entropy_threshold(self.histogram)
        return self._within(-threshold, threshold)


def estimator(
    method: Method,
    symmetric: bool = True,
    *,
    bins: int = 2048,
    percentile: float = 99.999,
    momentum: float = 0.01,
    norm: float = 2.0,
) -> RangeEstimator:
    """The estimator of that name; each takes of the options what it knows.

    Raises:
        ValueError: an unknown method, or an option out of its bounds.
    """
    made: dict[str, Callable[[], RangeEstimator]] = {
        "minmax": lambda: MinMax(symmetric),
        "moving_average": lambda: MovingAverage(symmetric, momentum),
        "percentile": lambda: Percentile(symmetric, bins, percentile),
        "mse": lambda: LeastError(symmetric, bins, norm),
        "entropy": lambda: Entropy(symmetric, bins),
    }
    if method not in made:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(made)}")
    return made[method]()


def static_grid(low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """Scale (a float32 number) and zero point of int8 activations that cover `[low, high]`.

    Symmetric: S = max(−low, high) / 127, Z = 0. Asymmetric, as ONNX's QuantizeLinear expects it: S = (high − low) / 255,
    Z = clamp(round(−128 − low / S)). A range of 0 alone gets S = 1.

    Raises:
        ValueError: a range beyond float32.
    """
    limits = torch.tensor([low, high], dtype=torch.float32)
    scale, zero = affine.scale_and_zero(limits[0], limits[1], AffineFormat(8, 0, symmetric))
    if not torch.isfinite(scale):
        raise ValueError(f"the range [{low:g}, {high:g}] has no float32 scale")
    return scale.item(), int(zero)
