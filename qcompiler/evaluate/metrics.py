"""What is measured, in float64 from float32 outputs, and its standard errors.

Tokens of one window share their context and their subject, so they are no independent samples: an error bar computed
from single tokens is too small. The mean over all tokens is therefore treated as a ratio of two sums over windows, and
its standard error is the delta method's for a ratio with the windows as the independent units (the cluster-robust error
of survey statistics):

    mean = S / N,  S = Σ s_w,  N = Σ n_w,  se² = W/(W-1) · Σ (s_w - mean · n_w)² / N²

The perplexity is exp(mean), and its standard error exp(mean) · se. One window alone has no standard error (None).
"""

from __future__ import annotations

import math

import numpy as np

# Elements in float64 at a time: what the processor's cache holds; whole windows take two to three times as long.
_CHUNK = 1 << 16


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log of the probabilities: float `[n, vocabulary]` in, float64 of the same shape out."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def token_nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood in nats of each label: `[n, vocabulary]` and int64 `[n]` in, float64 `[n]` out."""
    nll = np.empty(len(labels))
    for rows in _chunks(logits):
        nll[rows] = -np.take_along_axis(log_softmax(logits[rows]), labels[rows, None], axis=-1)[:, 0]
    return nll


def token_divergence(reference: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare two predictions of each token, `[n, vocabulary]` both.

    Returns:
        KL(reference ‖ logits) in nats, float64 `[n]`, and whether both have the same likeliest token, bool `[n]`.
    """
    kld, same = np.empty(len(logits)), np.empty(len(logits), dtype=bool)
    for rows in _chunks(logits):
        f, q = log_softmax(reference[rows]), log_softmax(logits[rows])
        p = np.exp(f)
        with np.errstate(invalid="ignore"):  # -inf - -inf, put right at once
            f -= q
        # A token that the reference rules out (-inf, for padded vocabularies) adds nothing.
        f[p == 0] = 0
        # Rounding can bring the sum below zero; the divergence cannot be.
        kld[rows] = np.maximum((p * f).sum(axis=-1), 0.0)
        same[rows] = reference[rows].argmax(axis=-1) == logits[rows].argmax(axis=-1)
    return kld, same


def _chunks(logits: np.ndarray) -> list[slice]:
    step = max(1, _CHUNK // max(1, logits.shape[-1]))
    return [slice(i, i + step) for i in range(0, len(logits), step)]


class Mean:
    """Mean over tokens with its standard error over windows; holds two numbers a window."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, values: np.ndarray) -> None:
        """The values of one window, `[n]`."""
        self._sums.append(float(values.sum(dtype=np.float64)))
        self._counts.append(len(values))

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def mean(self) -> float:
        return math.fsum(self._sums) / self.count

    @property
    def se(self) -> float | None:
        n = len(self._sums)
        if n < 2:
            return None
        spread = math.fsum((s - self.mean * c) ** 2 for s, c in zip(self._sums, self._counts, strict=True))
        return math.sqrt(n / (n - 1) * spread) / self.count

    def exp(self) -> tuple[float, float | None]:
        """exp(mean) and its standard error: the perplexity, when the values are negative log-likelihoods."""
        value = math.exp(self.mean) if self.mean < 700 else math.inf  # a wrecked model overflows
        return value, None if self.se is None else value * self.se


class OutputError:
    """How far an output without a vocabulary (hidden states, a pooled vector) is from the float model's."""

    def __init__(self) -> None:
        self._cosine = Mean()
        self._signal = self._noise = self._most = 0.0

    def add(self, reference: np.ndarray, output: np.ndarray) -> None:
        """One window's values, float of one and the same shape; the last axis is the vector."""
        f, q = (
            np.atleast_2d(np.asarray(a, np.float64)).reshape(-1, np.shape(a)[-1] if np.ndim(a) else 1)
            for a in (reference, output)
        )
        lengths = np.linalg.norm(f, axis=1) * np.linalg.norm(q, axis=1)
        dots = (f * q).sum(axis=1)
        # Two zero vectors agree; one zero vector beside another has no direction to agree with.
        both_zero = ~f.any(axis=1) & ~q.any(axis=1)
        self._cosine.add(np.where(lengths > 0, dots / np.where(lengths > 0, lengths, 1), both_zero))
        noise = f - q
        self._signal += float((f * f).sum())
        self._noise += float((noise * noise).sum())
        self._most = max(self._most, float(np.abs(noise).max(initial=0.0)))

    def result(self) -> dict[str, float | None]:
        """`cosine` (mean over vectors) and `cosine_se`, `sqnr_db` (None where there is no error), `max_error`."""
        sqnr = None if self._noise == 0 else 10 * math.log10(max(self._signal, 1e-300) / self._noise)
        return {"cosine": self._cosine.mean, "cosine_se": self._cosine.se, "sqnr_db": sqnr, "max_error": self._most}
