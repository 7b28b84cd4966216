"""The histogram's counts: right, and the same however the stream comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.numerics.histogram import Histogram


def stream(seed: int = 0) -> torch.Tensor:
    """Numbers whose size grows, so that the range must double while they come."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6000, generator=generator) * torch.logspace(-4, 3, 6000)
    x[::500] = 0
    return x


def counted(*parts: torch.Tensor, bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.update(part)
    return histogram


def test_counts_are_those_of_numpy():
    x = stream()
    histogram = counted(x)
    expected, _ = np.histogram(x.double().numpy(), histogram.edges().numpy())
    assert histogram.counts.tolist() == expected.tolist()
    assert (histogram.low, histogram.high, histogram.total) == (x.min().item(), x.max().item(), len(x))


def test_at_least_as_many_bins_as_asked_for_cover_what_was_seen():
    for scale in (1e-30, 0.51, 0.99, 1.0, 3e30):
        histogram = counted(torch.tensor([scale, -scale / 3]))
        assert 2 * histogram.absmax / histogram.width >= 64


@pytest.mark.parametrize("bins", [64, 100])
@pytest.mark.parametrize("cut", [1, 7, 1000, 5999])
def test_counts_do_not_depend_on_cut_or_order(cut, bins):
    x = stream()
    whole = counted(x, bins=bins)
    forward, backward = counted(*x.split(cut), bins=bins), counted(*x.flip(0).split(cut), bins=bins)
    for other in (forward, backward):
        assert torch.equal(other.counts, whole.counts)
        assert (other.exponent, other.low, other.high) == (whole.exponent, whole.low, whole.high)


def test_merging_is_counting_together():
    x = stream()
    whole = counted(x)
    for first, second in ((x[:100], x[100:]), (x[100:], x[:100]), (torch.zeros(5), x), (x, torch.zeros(5)), (x, x[:0])):
        merged, other = counted(first), counted(second)
        before = other.counts.clone()
        merged.merge(other)
        assert torch.equal(merged.counts, counted(torch.cat([first, second])).counts)
        assert torch.equal(other.counts, before) and merged.absmax == whole.absmax
    with pytest.raises(ValueError, match="64 and 128 bins do not merge"):
        whole.merge(Histogram(128))


def test_only_zeros_have_no_width():
    histogram = counted(torch.zeros(3, 4), torch.empty(0, 4))
    assert histogram.width == 0 and histogram.counts.sum() == histogram.total == 12


@pytest.mark.parametrize("bad, kind", [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")])
def test_what_is_not_finite_is_refused(bad, kind):
    with pytest.raises(ValueError, match=f"hold {kind}"):
        counted(torch.tensor([1.0, bad, 2.0]))
