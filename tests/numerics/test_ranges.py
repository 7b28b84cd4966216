"""Range estimators: what each promises, and the entropy search against its definition and against ONNX Runtime's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qcompiler.numerics import ranges
from qcompiler.numerics.entropy import EPSILON, kl_divergences
from qcompiler.numerics.ranges import estimator, static_grid

METHODS = ("minmax", "moving_average", "percentile", "mse", "entropy")
COUNTED = ("percentile", "mse", "entropy")
forms = pytest.mark.parametrize("symmetric", [True, False])


def heavy(seed: int = 0, count: int = 40000) -> torch.Tensor:
    """A Laplace sample of standard deviation 1 and one number of 100 of them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    x = (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()
    x[count // 3] = 100.0
    return x[:, None]


def estimate(method: str, *parts: torch.Tensor, symmetric: bool = True, **options) -> tuple[float, float]:
    made = estimator(method, symmetric, **options)
    for part in parts:
        made.update(part)
    return made.range()


def quantization_error(x: torch.Tensor, limits: tuple[float, float], symmetric: bool = True) -> float:
    scale, zero = static_grid(*limits, symmetric)
    codes = (torch.round(x / scale) + zero).clamp(-127 if symmetric else -128, 127)
    return (x - scale * (codes - zero)).double().square().sum().item()


@forms
@pytest.mark.parametrize("method", METHODS)
def test_no_estimate_is_wider_than_what_was_seen(method, symmetric):
    for x in (heavy(), heavy().abs(), -heavy().abs(), heavy() + 3):
        low, high = estimate(method, *x.split(999), symmetric=symmetric)
        full_low, full_high = estimate("minmax", x, symmetric=symmetric)
        assert full_low <= low <= 0 <= high <= full_high
        assert not symmetric or low == -high
        assert high > low


def test_minmax_is_the_range_with_zero_in_it():
    x = torch.tensor([[1.0, 3.0], [2.5, 0.5]])
    assert estimate("minmax", x, symmetric=False) == (0, 3) and estimate("minmax", -x, symmetric=False) == (-3, 0)
    assert estimate("minmax", -x) == (-3, 3)


@forms
@pytest.mark.parametrize("method", ["minmax", *COUNTED])
def test_result_does_not_depend_on_the_cut_and_halves_merge(method, symmetric):
    x = heavy()
    whole = estimate(method, x, symmetric=symmetric)
    assert estimate(method, *x.split(777), symmetric=symmetric) == whole
    assert estimate(method, *x.flip(0).split(5000), symmetric=symmetric) == whole
    first, second = estimator(method, symmetric), estimator(method, symmetric)
    first.update(x[:100])
    second.update(x[100:])
    first.merge(second)
    assert first.range() == whole


def test_moving_average_follows_its_recurrence():
    low, high = estimate("moving_average", *torch.tensor([[1.0, -1.0], [3.0, -5.0], [0.0, 0.0]]), symmetric=False, momentum=0.5)
    assert (low, high) == (-1.5, 1.0)
    assert estimate("moving_average", *heavy().split(1000), momentum=1.0) == estimate("minmax", heavy()[-1000:])


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_leaves_that_share_outside_within_a_bin(percentile):
    x = heavy()
    made = estimator("percentile", percentile=percentile)
    made.update(x)
    width, outside = made.histogram.width, len(x) * (1 - percentile / 100)
    threshold = made.range()[1]
    assert (x.abs() > threshold).sum() <= outside < (x.abs() > threshold - width).sum()
    low, high = estimate("percentile", x, percentile=percentile, symmetric=False)
    for side, bound in ((-x, -low), (x, high)):
        assert (side > bound).sum() <= outside / 2 < (side > bound - width).sum()


@forms
def test_all_of_it_is_the_range(symmetric):
    x = heavy()
    assert estimate("percentile", x, percentile=100, symmetric=symmetric) == estimate("minmax", x, symmetric=symmetric)


@forms
def test_error_search_is_no_worse_than_minmax_and_better_where_clipping_pays(symmetric):
    generator = torch.Generator().manual_seed(1)
    samples = {
        "uniform": torch.rand(20000, 1, generator=generator) - 0.3,
        "normal": torch.randn(20000, 1, generator=generator),
        # one number at 3 beside many in [−1, 1]: to clip it costs 4, not to clip it a step three times as wide
        "outlier": torch.cat([torch.rand(300000, 1, generator=generator) * 2 - 1, torch.tensor([[3.0]])]),
    }
    ratios = {}
    for name, x in samples.items():
        found, full = (estimate(method, x, symmetric=symmetric) for method in ("mse", "minmax"))
        ratios[name] = quantization_error(x, found, symmetric) / quantization_error(x, full, symmetric)
    assert max(ratios.values()) <= 1 and ratios["outlier"] < 0.75 and ratios["normal"] < 1


def test_lower_norms_clip_more():
    x = heavy().clamp(max=12)
    assert estimate("mse", x, norm=1.0)[1] <= estimate("mse", x, norm=2.0)[1] <= estimate("mse", x, norm=4.0)[1]


# ── Entropy ──


def definition(counts: np.ndarray, levels: int) -> list[float]:
    """The loop of the definition, bin by bin."""
    middle, found = len(counts) // 2, []
    for i in range(levels // 2, middle + 1):
        part = counts[middle - i : middle + i].astype(float)
        reference = part.copy()
        reference[0] += counts[: middle - i].sum()
        reference[-1] += counts[middle + i :].sum()
        bucket = np.arange(2 * i) * levels // (2 * i)
        candidate = np.zeros(2 * i)
        for b in range(levels):
            members = bucket == b
            full = members & (reference > 0)
            candidate[full] = part[members].sum() / max(full.sum(), 1)
        if not part.sum():
            found.append(math.inf)
            continue
        candidate[(candidate == 0) & (reference > 0)] = EPSILON
        p, q = reference / reference.sum(), candidate / candidate.sum()
        some = p > 0
        found.append(float((p[some] * np.log(p[some] / q[some])).sum()))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_divergences_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    counts = np.round(3000 * np.exp(-np.abs(np.arange(200) - 99.5) / 12) * rng.random(200)).astype(int)
    counts[:9], counts[-4:] = 0, (0, 0, 2, 1)
    if seed == 3:
        counts[80:120] = 0  # the first candidates keep nothing
    expected = definition(counts, 16)
    assert kl_divergences(torch.from_numpy(counts), 16).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert min(expected) >= 0


def test_entropy_clips_the_outlier_and_is_not_minmax():
    threshold = estimate("entropy", heavy())[1]
    assert 3 < threshold < 30 < estimate("minmax", heavy())[1] == 100


def test_onnxruntimes_entropy_with_its_defaults_is_minmax():
    """128 bins and 128 levels leave one candidate, the whole range; with as many bins as ours it clips as we do."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    x = heavy().numpy()

    def threshold(bins: int) -> float:
        collector = calibrate.HistogramCollector(
            method="entropy", symmetric=True, num_bins=bins, num_quantized_bins=128, percentile=99.999, scenario="same"
        )
        collector.collect({"x": x})
        return float(collector.compute_collection_result()["x"][1])

    import inspect

    defaults = inspect.signature(calibrate.EntropyCalibrater.__init__).parameters
    assert (defaults["num_bins"].default, defaults["num_quantized_bins"].default) == (128, 128)
    assert threshold(128) == x.max() == 100
    assert threshold(128) != estimate("entropy", torch.from_numpy(x))[1]


def test_few_bins_are_refused():
    with pytest.raises(ValueError, match="at least 2048, got 128"):
        estimator("entropy", bins=128)


# ── Degenerate inputs ──


@forms
@pytest.mark.parametrize("method", METHODS)
def test_zeros_constants_and_nothing(method, symmetric):
    for x in (torch.zeros(5, 3), torch.empty(0, 3)):
        limits = estimate(method, x, symmetric=symmetric)
        assert limits == (0, 0) and static_grid(*limits, symmetric)[0] == 1
    for value in (2.5, -1e-6, 1e30):
        low, high = estimate(method, torch.full((50, 3), value), symmetric=symmetric)
        covered = (low, high)[value > 0]
        # a search over factors may clip a constant by no more than half a step
        assert abs(covered - value) <= abs(value) * (1e-6 if method != "mse" else 0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(method, bad):
    with pytest.raises(ValueError, match="expected finite"):
        estimate(method, torch.tensor([[0.0, bad]]))


def test_options_out_of_bounds_are_refused():
    for options, message in [
        ({"method": "median"}, "unknown method 'median'; known: minmax"),
        ({"method": "percentile", "percentile": 101}, "percentile must be in"),
        ({"method": "moving_average", "momentum": 0}, "momentum must be in"),
        ({"method": "mse", "norm": 0}, "norm must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimator(**options)


# ── The grid ──


@forms
def test_grid_is_onnxs(symmetric):
    for low, high in [(-1.5, 2.5), (0.0, 6.0), (-3.0, 0.0), (-0.01, 40.0)]:
        scale, zero = static_grid(low, high, symmetric)
        assert np.float32(scale) == scale
        if symmetric:
            assert zero == 0 and scale == pytest.approx(max(-low, high) / 127, rel=1e-6)
        else:
            assert scale == pytest.approx((high - low) / 255, rel=1e-6) and zero == round(-128 - low / scale)
            assert -128 <= zero <= 127
            for bound in (low, high):
                code = round(bound / scale) + zero
                assert -128 - 1 <= code <= 127 + 1  # Z is rounded: an end may fall half a step outside


def test_shrinking_starts_at_the_whole_range():
    assert ranges.SHRINK[0] == 1.0 and min(ranges.SHRINK) == 0.2
