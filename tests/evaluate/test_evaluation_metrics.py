"""Metrics against brute force in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompiler.evaluate import metrics


def _softmax(row: np.ndarray) -> list[float]:
    exps = [math.exp(float(v) - float(row.max())) for v in row]
    return [e / math.fsum(exps) for e in exps]


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    f = (rng.standard_normal((13, 37)) * 4).astype(np.float32)
    return f, (f + rng.standard_normal(f.shape) * 0.3).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_nll_and_divergence_against_brute_force(logits, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    f, q = logits
    labels = np.random.default_rng(1).integers(0, 37, 13)
    kld, same = metrics.token_divergence(f, q)
    nll = metrics.token_nll(q, labels)
    for i in range(13):
        p, r = _softmax(f[i]), _softmax(q[i])
        assert nll[i] == pytest.approx(-math.log(r[labels[i]]), rel=1e-12)
        assert kld[i] == pytest.approx(math.fsum(a * math.log(a / b) for a, b in zip(p, r, strict=True)), abs=1e-13)
        assert same[i] == (p.index(max(p)) == r.index(max(r)))
    assert 0 < same.sum() < 13 or (kld > 0).all()


def test_direction_of_the_divergence():
    """KL(reference ‖ logits): what the reference deems likely and the other does not costs most."""
    reference, other = np.array([[0.0, 0.0]], np.float32), np.array([[0.0, -20.0]], np.float32)
    assert metrics.token_divergence(reference, other)[0][0] == pytest.approx(0.5 * 20 - math.log(2), abs=1e-6)
    assert metrics.token_divergence(other, reference)[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_identical_logits_diverge_by_nothing_at_all(logits):
    kld, same = metrics.token_divergence(logits[0], logits[0].copy())
    assert (kld == 0).all() and same.all()


def test_large_and_ruled_out_logits():
    """Nothing overflows, and a padded vocabulary's -inf adds nothing when both have it."""
    f = np.array([[1e4, 0, -np.inf], [-1e4, -1e4, -np.inf]], np.float32)
    kld, _ = metrics.token_divergence(f, f)
    assert (kld == 0).all()
    assert metrics.token_nll(f, np.array([0, 1])) == pytest.approx([0, math.log(2)])


def test_mean_and_its_standard_error():
    """Against the delta method spelt out, and against the spread of the mean over many samples of such windows."""
    rng = np.random.default_rng(0)

    def sample() -> metrics.Mean:
        mean = metrics.Mean()
        for length in (30, 60, 90) * 10:
            mean.add(rng.normal(2 + rng.normal(0, 0.5), 1, length))  # windows differ, as texts do
        return mean

    one = metrics.Mean()
    windows = [np.array([1.0, 2.0]), np.array([3.0]), np.array([1.0, 1.0, 4.0])]
    for window in windows:
        one.add(window)
    m = 12 / 6
    spread = sum((w.sum() - m * len(w)) ** 2 for w in windows)
    assert one.mean == m and one.count == 6
    assert one.se == pytest.approx(math.sqrt(3 / 2 * spread) / 6)
    assert one.exp() == (pytest.approx(math.exp(m)), pytest.approx(math.exp(m) * one.se))

    samples = [sample() for _ in range(400)]
    observed = np.std([s.mean for s in samples])
    assert np.mean([s.se for s in samples]) == pytest.approx(observed, rel=0.1)


def test_one_window_has_no_standard_error():
    mean = metrics.Mean()
    mean.add(np.array([1.0, 2.0]))
    assert mean.se is None and mean.exp() == (math.exp(1.5), None)


def test_perplexity_of_a_wrecked_model_is_infinite():
    mean = metrics.Mean()
    mean.add(np.array([1e4]))
    assert mean.exp()[0] == math.inf


def test_output_error():
    rng = np.random.default_rng(0)
    f = rng.standard_normal((5, 8)).astype(np.float32)
    q = f + np.float32(0.01) * rng.standard_normal((5, 8)).astype(np.float32)
    error = metrics.OutputError()
    error.add(f[:2], q[:2])
    error.add(f[2:], q[2:])
    found = error.result()
    f64, q64 = f.astype(float), q.astype(float)
    cosines = (f64 * q64).sum(1) / np.linalg.norm(f64, axis=1) / np.linalg.norm(q64, axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean(), rel=1e-12)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((f64**2).sum() / ((f64 - q64) ** 2).sum()), rel=1e-12)
    assert found["max_error"] == np.abs(f64 - q64).max()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_output_error_of_equal_outputs(shape):
    error = metrics.OutputError()
    error.add(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    assert error.result() == {"cosine": 1.0, "cosine_se": None, "sqnr_db": None, "max_error": 0.0}
