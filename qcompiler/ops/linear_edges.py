"""The edges of a linear op: what it does to its input before, and to its product after (docs/layout.md, "Edges").

x' = RMSNorm(x)                                        input `norm`, attribute `epsilon`
P  = x' · Wᵀ + bias
y  = act(P[..., :h]) · P[..., h:]                      attribute `gate`; the weight has n = 2h rows
y  = y + residual                                      input `residual`

The arithmetic is that of the kernels; activations are taken in float64 and rounded to float32 once, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from qcompiler.ops.formats import TILE
from qcompiler.ops.spec import Case, Input

SUMS = 16  # of squares, side by side: column i goes to sum i mod 16
INPUTS = (Input("residual", "float32", optional=True), Input("norm", "float32", optional=True))
DEFAULTS: dict[str, int | float] = {"gate": 0, "epsilon": 0.0}


class Gate(IntEnum):
    """The activation of a gated product; the value is the attribute `gate`."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    GELU = 3

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


def output_columns(attributes: Mapping[str, int]) -> int:
    """Columns of y: half of the weight's rows where there is a gate."""
    return attributes["n"] // 2 if attributes.get("gate") else attributes["n"]


def check(attributes: Mapping[str, Any], present: Collection[str]) -> None:
    """What the attributes must be.

    Raises:
        ValueError: a gate that is none, halves that are no whole tiles, an epsilon without a norm or below 0.
    """
    gate, epsilon, n = attributes.get("gate", 0), attributes.get("epsilon", 0.0), attributes["n"]
    if gate not in tuple(Gate):
        raise ValueError(f"gate is {gate!r}, expected {', '.join(f'{g.value} ({g.label})' for g in Gate)}")
    if gate and n % (2 * TILE):
        raise ValueError(f"a gated weight has two halves of a multiple of {TILE} rows, found n = {n}")
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon is {epsilon!r}, expected a finite number of at least 0")
    if epsilon and "norm" not in present:
        raise ValueError(f"epsilon is {epsilon!r} without the input norm, expected 0")


def words(attributes: Mapping[str, Any], present: frozenset[str]) -> list[str]:
    """What the edges add to the label of a variant, for instance `["norm", "silu", "residual"]`.

    Raises:
        ValueError: as `check`.
    """
    check(attributes, present)
    gate = Gate(attributes.get("gate", 0))
    return ["norm"] * ("norm" in present) + [gate.label] * (gate > 0) + ["residual"] * ("residual" in present)


def normalize(x: np.ndarray, norm: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm of float32 `[..., k]` to the bit: squares and their sums in float64, 16 sums side by side, then by halves."""
    k = x.shape[-1]
    wide = np.zeros((*x.shape[:-1], -(-k // SUMS) * SUMS))
    wide[..., :k] = x
    parts = (wide * wide).reshape(*x.shape[:-1], wide.shape[-1] // SUMS, SUMS)
    sums = np.zeros((*x.shape[:-1], SUMS))
    for step in range(parts.shape[-2]):
        sums += parts[..., step, :]
    while sums.shape[-1] > 1:
        width = sums.shape[-1] // 2
        sums = sums[..., :width] + sums[..., width:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = (1 / np.sqrt(sums / k + np.float64(np.float32(epsilon)))).astype(np.float32)
        return x * factor * norm


def _sigmoid_times(value: np.ndarray, slope: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.where(value < -1000, -1000, value) / (1 + np.exp(-np.clip(slope, -700, 700)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    # 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
    return _sigmoid_times(x, 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _gelu(x: np.ndarray) -> np.ndarray:
    tails = [math.erfc(-value / math.sqrt(2)) for value in np.maximum(x, -15).flat]
    return np.maximum(x, -15) * 0.5 * np.array(tails).reshape(x.shape)


ACTIVATIONS: dict[Gate, Callable[[np.ndarray], np.ndarray]] = {
    Gate.SILU: lambda x: _sigmoid_times(x, x),
    Gate.GELU_TANH: _gelu_tanh,
    Gate.GELU: _gelu,
}


def normalized(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> np.ndarray:
    """x as the product sees it, float32."""
    x = np.asarray(inputs["x"], np.float32)
    norm = inputs.get("norm")
    check(attributes, [name for name, value in inputs.items() if value is not None])
    return x if norm is None else normalize(x, norm, attributes.get("epsilon", 0.0))


def finished(product: np.ndarray, inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> np.ndarray:
    """y from P, float32 `[..., n]`."""
    y = product
    if gate := attributes.get("gate", 0):
        first, second = np.split(y, 2, axis=-1)
        with np.errstate(invalid="ignore", over="ignore"):
            y = ACTIVATIONS[Gate(gate)](first.astype(np.float64)).astype(np.float32) * second
    residual = inputs.get("residual")
    return y if residual is None else y + residual


# The weight's rows must be two halves of whole tiles; (leading shape, n, k).
SHAPES = (((1,), 32, 128), ((3,), 96, 96), ((2, 5), 64, 200), ((20,), 160, 256), ((0,), 32, 64), ((1,), 224, 300))


def cases(plain: Callable[[np.random.Generator, tuple[int, ...], int, int, int], Case]) -> Iterator[Case]:
    """Every edge alone and together, on every shape in turn.

    Args:
        plain: `(rng, leading shape, n, k, number) -> case` without edges; the number picks format, activations and bias.
    """
    rng, number = np.random.default_rng(5), 0
    for gate in Gate:
        for present in ((), ("residual",), ("norm",), ("norm", "residual")):
            for _ in range(3 if gate or present else 0):
                lead, n, k = SHAPES[number % len(SHAPES)]
                case = plain(rng, lead, n, k, number)
                number += 1
                attributes = {**case.attributes, "gate": int(gate), "epsilon": 1e-5 if "norm" in present else 0.0}
                drawn = {
                    "norm": rng.uniform(0.5, 1.5, k).astype(np.float32),
                    "residual": rng.standard_normal((*lead, output_columns(attributes))).astype(np.float32),
                }
                edges = {name: drawn[name] if name in present else None for name in drawn}
                label = " ".join([case.label, *words(attributes, frozenset(present))])
                yield Case(label, {**case.inputs, **edges}, attributes)
