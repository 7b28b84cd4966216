"""What is compared: a side is a kernel in a format, opened for a case, that walks over many matrices in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

TOLERANCE = 0.02  # relative error of a right product: 8-bit activations and bfloat16 stay below 0.01, other weights give 1
CHECKED = 128  # outputs of the first matrix that are compared


class Skipped(Exception):
    """A side that cannot run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """y[rows, n] = x[rows, k] · Wᵀ for `weight_bytes` of matrices W (at least one), or `matrices` of them where that is given."""

    n: int
    k: int
    rows: int
    threads: int
    weight_bytes: int
    matrices: int | None = None

    def count(self, matrix_bytes: int) -> int:
        """Matrices of that many bytes each that a walk reads."""
        return self.matrices or max(1, -(-self.weight_bytes // matrix_bytes))

    def x(self) -> np.ndarray:
        """The activations, float32 `[rows, k]`: normal, the same in every side."""
        return np.random.default_rng(7).standard_normal((self.rows, self.k), np.float32)


@dataclass
class Opened:
    """A side that is ready.

    Attributes:
        walk: multiplies with every matrix once.
        matrices: how many that are.
        matrix_bytes: of one, as stored: codes, scales, zeros, codebooks.
        product: result of the first matrix, float32 `[rows, some outputs]`, and the float product of its dequantized weights.
        close: gives memory back.
    """

    walk: Callable[[], object]
    matrices: int
    matrix_bytes: int
    product: Callable[[], tuple[np.ndarray, np.ndarray]]
    close: Callable[[], None] = lambda: None

    def error(self) -> float:
        """Relative error of the product."""
        found, expected = self.product()
        return relative_error(found, expected)


class Side(Protocol):
    """A kernel in a format. `family`: `ours` or the program that it belongs to; `name` is unique in a run."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    def open(self, case: Case) -> Opened:
        """Raises `Skipped` where it cannot run."""
        ...


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over that of what was expected; infinite where something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))
