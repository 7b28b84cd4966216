"""A histogram of a stream of numbers: one pass, fixed memory, and the same counts however the stream is cut."""

from __future__ import annotations

import math

import torch

CHUNK = 2**18  # numbers that are counted at once: their float64 copies stay small


class Histogram:
    """Counts over [−M, M) in bins of equal width, M the smallest power of two above every |x| seen.

    M doubles when a number does not fit, and neighbouring bins merge in pairs around 0. Bin edges of the finer grid are edges
    of the coarser one, so the counts depend on the numbers alone: not on their order, nor on how they are cut into batches or
    between processes (`merge`).

    Args:
        bins: least number of bins over [−max|x|, max|x|]; M may be twice max|x|, so twice as many are kept. A multiple of 4.

    Attributes:
        counts: int64 `[2 · bins]`.
        exponent: M = 2^exponent; None as long as only zeros were seen.
        low, high: smallest and largest number seen; 0 as long as there was none.
        total: how many were seen.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"bins must be a positive multiple of 4, got {bins}")
        self.bins = bins
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)
        self.exponent: int | None = None
        self.low = self.high = 0.0
        self.total = 0

    @property
    def width(self) -> float:
        """Width of a bin; 0 as long as only zeros were seen."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent) / self.bins

    @property
    def absmax(self) -> float:
        return max(-self.low, self.high)

    def edges(self) -> torch.Tensor:
        """float64 `[2 · bins + 1]`, ascending, 0 in the middle."""
        return torch.arange(-self.bins, self.bins + 1, dtype=torch.float64) * self.width

    def update(self, x: torch.Tensor) -> None:
        """Count the numbers of `x`, any shape, floating.

        Raises:
            ValueError: NaN or infinity.
        """
        if not x.numel():
            return
        low, high = bounds(x)
        self._seen(low, high, x.numel())
        if self.exponent is None:
            self.counts[self.bins] += x.numel()
            return
        scale = self.bins * math.ldexp(1.0, -self.exponent)
        for part in x.reshape(-1).split(CHUNK):
            # a power of two times a number: exact, so equal numbers share a bin in every grid
            index = (part.double() * scale).floor_().long().add_(self.bins)
            self.counts += torch.bincount(index, minlength=2 * self.bins).to(self.counts.device)

    def merge(self, other: Histogram) -> None:
        """Add what another histogram of as many bins has counted; `other` stays as it is."""
        if other.bins != self.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins do not merge")
        if not other.total:
            return
        self._seen(other.low, other.high, other.total)
        counts, steps = other.counts, 0
        if self.exponent is not None and other.exponent is not None:
            steps = self.exponent - other.exponent
        for _ in range(steps):
            counts = _halved(counts)
        self.counts += counts

    def _seen(self, low: float, high: float, count: int) -> None:
        if not self.total:
            self.low, self.high = low, high
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += count
        largest = max(-low, high)
        if not largest:
            return
        exponent = math.frexp(largest)[1]  # largest < 2^exponent
        if self.exponent is None:
            self.exponent = exponent
        # beyond some steps everything has come to lie in the two bins at 0, and stays there
        for _ in range(min(exponent - self.exponent, 2 + self.bins.bit_length())):
            self.counts = _halved(self.counts)
        self.exponent = max(self.exponent, exponent)

    def magnitudes(self) -> torch.Tensor:
        """Counts of |x|, int64 `[bins]`: bin i holds |x| in [i, i + 1] · width."""
        return self.counts[self.bins :] + self.counts[: self.bins].flip(0)


def bounds(x: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest number of `x`.

    Raises:
        ValueError: NaN or infinity.
    """
    low, high = (value.item() for value in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        kind = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
        raise ValueError(f"the values to be observed hold {kind}; expected finite ones")
    return low, high


def _halved(counts: torch.Tensor) -> torch.Tensor:
    """The same numbers in bins twice as wide: pairs merge, both outer quarters become empty."""
    merged = counts.view(-1, 2).sum(dim=1)
    empty = torch.zeros(len(merged) // 2, dtype=counts.dtype)
    return torch.cat([empty, merged, empty])
