"""Random weights of peers. Where matrices are chained, each product keeps the size of what goes in, so nothing overflows."""

from __future__ import annotations

import numpy as np

from tools.bench.kernels_side import CHECKED, Case, Skipped


def generator(index: int) -> np.random.Generator:
    """Of matrix `index`: the same in every run."""
    return np.random.default_rng(1000 + index)


def codes(rng: np.random.Generator, n: int, k: int, bits: int) -> np.ndarray:
    """Packed codes of `bits` bits, uint8 `[n, k · bits / 8]`; the lowest bits of a byte come first."""
    return np.frombuffer(rng.bytes(n * k * bits // 8), np.uint8).reshape(n, k * bits // 8)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[rows, k]` of packed `[rows, k · bits / 8]`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & (1 << bits) - 1).reshape(len(packed), -1)


def scales(rng: np.random.Generator, shape: tuple[int, ...], k: int, bits: int) -> np.ndarray:
    """Float32 scales of uniform codes around 2^(bits-1), such that a product keeps the size of its activations.

    Their signs are random: the mean of such codes is -1/2, and a chain of weights with a mean of one sign would grow.
    """
    size = ((4**bits + 2) / 12 * 13 / 12) ** 0.5  # root of the mean square of the codes, and of the magnitudes below
    magnitudes = rng.uniform(0.5, 1.5, shape) / (size * k**0.5)
    return (magnitudes * rng.choice([-1, 1], shape)).astype(np.float32)


def spread(values: np.ndarray, group: int) -> np.ndarray:
    """One value a group -> one a column."""
    return np.repeat(values, group, axis=1)


def checked_rows(n: int) -> int:
    return min(CHECKED, n)


def need_square(case: Case) -> None:
    """A walk over one graph multiplies the result of a matrix with the next."""
    if case.n != case.k:
        raise Skipped("its matrices are chained in one graph: they must be square")


def need_multiple(case: Case, group: int) -> None:
    if case.k % group:
        raise Skipped(f"its groups are {group} columns: {case.k} are no multiple")
