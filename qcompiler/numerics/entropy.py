"""The clipping threshold of least KL divergence (Migacz, "8-bit inference with TensorRT", GTC 2017)."""

from __future__ import annotations

import torch

from qcompiler.numerics.histogram import Histogram

LEVELS = 128  # buckets that a candidate's bins are merged into
EPSILON = 1e-4  # of one count: what an empty bin of the candidate holds


def entropy_threshold(histogram: Histogram, levels: int = LEVELS) -> float:
    """T in (0, max|x|]; 0 when only zeros were seen."""
    if not histogram.width:
        return histogram.absmax
    counts = histogram.counts
    half = len(counts) // 2
    # bins beyond max|x| are empty on both sides: their candidates would all be the full range
    used = (counts != 0).nonzero().flatten() - half
    reach = int(torch.maximum(used + 1, -used).max())
    divergences = kl_divergences(counts[half - reach : half + reach], levels)
    return min((levels // 2 + int(divergences.argmin())) * histogram.width, histogram.absmax)


def kl_divergences(counts: torch.Tensor, levels: int = LEVELS) -> torch.Tensor:
    """KL(reference ‖ candidate) of every clipping of a histogram.

    For i = levels/2 … B/2 the middle 2·i bins are kept. Reference: these, with what lies beyond added to the first and the
    last of them. Candidate: these without it, merged into `levels` buckets, each spread evenly over those of its bins that are
    not empty in the reference. Where only the reference has mass (an end bin whose bucket is empty inside) the candidate
    gets `EPSILON` counts; where the reference has none the divergence has no term. A candidate that keeps nothing is at ∞.

    Everything follows from running sums at the buckets' edges: Σ ref·log ref is known bin by bin, and the candidate is
    constant over a bucket.

    Args:
        counts: `[B]`, B even and at least `levels`, 0 in the middle.

    Returns:
        float64 `[B/2 − levels/2 + 1]`.
    """
    middle = len(counts) // 2
    h = counts.double()
    halves = torch.arange(levels // 2, middle + 1)[:, None]
    first, last = (middle - halves).squeeze(1), (middle + halves - 1).squeeze(1)
    mass, entropy, filled = (_running(t) for t in (h, torch.special.xlogy(h, h), (h > 0).double()))
    total = mass[-1]
    left, right = mass[first], total - mass[last + 1]

    # bucket b holds the bins p with floor(p · levels / 2i) = b
    edges = first[:, None] - (-torch.arange(levels + 1) * 2 * halves // levels)
    inside = mass[edges].diff(dim=1)
    reference = inside.clone()
    reference[:, 0] += left
    reference[:, -1] += right
    bins = filled[edges].diff(dim=1)
    bins[:, 0] += (h[first] == 0) & (left > 0)
    bins[:, -1] += (h[last] == 0) & (right > 0)

    own = entropy[last + 1] - entropy[first]
    for tail, end in ((left, first), (right, last)):
        own += torch.special.xlogy(h[end] + tail, h[end] + tail) - torch.special.xlogy(h[end], h[end])
    empty = (inside == 0) & (reference > 0)
    level = torch.where(empty, EPSILON, inside / bins.clamp(min=1))
    cross = torch.special.xlogy(reference, level).sum(dim=1)
    kept = total - left - right
    held = kept + EPSILON * empty.sum(dim=1)
    divergence = (own - cross) / total - torch.log(total) + torch.log(held)
    return torch.where(kept > 0, divergence, torch.inf)


def _running(x: torch.Tensor) -> torch.Tensor:
    """`[B]` -> `[B + 1]`: the sum of all before."""
    return torch.cat([torch.zeros(1, dtype=x.dtype), x.cumsum(0)])
