"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompiler.errors import GateError, UsageError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, else drawn; the same seed draws the same tokens.

    Attributes:
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        top_k: draw from the k likeliest only.
        top_p: draw from the likeliest that together reach this probability.
        seed: None draws differently every time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    _random: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    def __call__(self, logits: np.ndarray) -> int:
        """The next token's id from its logits, float32 [vocabulary]. Raises `GateError` when they are not numbers."""
        best = int(np.argmax(logits))  # the index of a NaN, where there is one
        if np.isnan(logits[best]):
            raise GateError("the logits are not numbers (NaN): the artifact, or what it was made from, is damaged")
        if self.temperature == 0 or self.top_k == 1:
            return best
        return self._draw(logits)

    def _draw(self, logits: np.ndarray) -> int:
        # Likeliest first, equal ones by id: the order, and so what a seed draws, is the same everywhere.
        order = np.argsort(-logits, kind="stable") if self.top_p is not None else None
        if self.top_k is not None and self.top_k < len(logits):
            kept = np.argsort(-logits, kind="stable")[: self.top_k] if order is None else order[: self.top_k]
        else:
            kept = order if order is not None else np.arange(len(logits))
        scaled = logits[kept].astype(np.float64)
        weights = np.exp((scaled - scaled.max()) / self.temperature)
        reached = np.cumsum(weights)
        if self.top_p is not None:
            count = int(np.searchsorted(reached, self.top_p * reached[-1])) + 1
            kept, reached = kept[:count], reached[:count]
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])
