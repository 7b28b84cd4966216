"""Static int8 activations: one scale and zero point a layer, and what the zero point adds to a product.

q = clamp(round_half_even(x / S) + Z),  x̃ = S · (q − Z),  W·x̃ = S · W·q − S · Z · Σ_k W[n, k]

The last term is the same for every x: the kernels multiply with q alone and add it as `activation_offset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler.ops.formats import AffineFormat

INPUTS = ("activation_scale", "activation_zero", "activation_offset")


def range_inputs(
    scale: float, zero: int, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, format: AffineFormat
) -> dict[str, np.ndarray | None]:
    """The three inputs of an op that say how its activations are rounded.

    Args:
        scale: S, finite and above 0.
        zero: Z in [−128, 127]; 0 means symmetric, q in [−127, 127], and needs neither zero point nor offset.
        codes, scales, zeros: the weight's, not packed: `[n, k]`, `[n, groups]`, `[n, groups]` or None.
        format: the weight's.

    Raises:
        ValueError: a scale or zero point outside these bounds.
    """
    s = np.float32(scale)
    if not (np.isfinite(s) and s > 0):
        raise ValueError(f"the scale of static activations is {scale!r}, expected a finite number above 0 in float32")
    if not -128 <= zero <= 127 or zero != int(zero):
        raise ValueError(f"the zero point of static activations is {zero!r}, expected a whole number in [-128, 127]")
    inputs: dict[str, np.ndarray | None] = {"activation_scale": np.array([s], np.float32)}
    if not zero:
        return inputs | {"activation_zero": None, "activation_offset": None}
    offset = activation_offset(s, int(zero), codes, scales, zeros, format)
    return inputs | {"activation_zero": np.array([zero], np.int8), "activation_offset": offset}


def activation_offset(
    scale: np.float32, zero: int, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, format: AffineFormat
) -> np.ndarray:
    """−S · Z · Σ_k W[n, k], float32 `[n]`, in the order and rounding of the kernels (docs/layout.md).

    So the product of a row of zeros, all of whose activations are Z, is cancelled to the bit.
    """
    n, k = codes.shape
    starts = np.arange(0, k, format.group or k)
    widths = np.diff(np.append(starts, k))
    levels = np.add.reduceat(codes, starts, axis=1, dtype=np.int64)
    levels -= widths * (format.center if zeros is None else zeros.astype(np.int64))
    acc = np.zeros(n, np.float32)
    for group in range(len(starts)):
        dot = (zero * levels[:, group]).astype(np.float32)
        acc = _fused_multiply_add(dot, scales[:, group].astype(np.float32) * scale, acc)
    return np.float32(0) - acc


def _fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c in float32, rounded once: exact product in float64, sum rounded to odd there, then to float32."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (error != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total).astype(np.float32)


def quantize_static(x: np.ndarray, scale: np.float32, zero: int | None) -> np.ndarray:
    """q − Z as float32, of the shape of x; `zero` None is symmetric. A row that is not finite comes out as NaN."""
    low = -127 if zero is None else -128
    z = np.float32(zero or 0)
    with np.errstate(over="ignore", invalid="ignore"):
        q = np.clip(np.rint(x / scale) + z, low, 127)
    return np.where(np.isfinite(x).all(axis=-1, keepdims=True), q - z, np.float32(np.nan))


def given_range(inputs: Mapping[str, Any]) -> tuple[np.float32, int | None]:
    """S and Z (None: symmetric) from an op's inputs.

    Raises:
        ValueError: the scale is missing, or one of zero point and offset without the other.
    """
    scale, zero, offset = (inputs.get(name) for name in INPUTS)
    if scale is None:
        raise ValueError("int8-static activations need the input activation_scale")
    if (zero is None) != (offset is None):
        raise ValueError("activation_zero and activation_offset are given together or not at all")
    return np.float32(scale[0]), None if zero is None else int(zero[0])
