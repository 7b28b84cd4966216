"""`linear_mixed`: a packed product beside a few columns in float, chosen when the model was calibrated.

y = linear_nbit(x with 0 in the outlier columns) + x[..., columns] · outliersᵀ

LLM.int8() with a fixed set of columns: the columns leave x before its largest value is taken, so that they do not spend
the range of the others. (Dettmers et al. 2022, arXiv 2208.07339, chooses the columns anew for every batch.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.ops import layout, linear_nbit
from qcompiler.ops.formats import BITS, GROUPS, TILE, Activation, AffineFormat
from qcompiler.ops.spec import Case, Input, OpSpec, declare


def check_columns(columns: np.ndarray, k: int) -> None:
    """Raises ValueError unless the columns ascend, each once, within [0, k)."""
    if columns.ndim != 1:
        raise ValueError(f"columns have {columns.ndim} dimensions, expected 1")
    bad = columns[(columns < 0) | (columns >= k)]
    if bad.size:
        raise ValueError(f"column {bad[0]} is outside a weight of {k} columns")
    step = np.flatnonzero(np.diff(columns.astype(np.int64)) <= 0)
    if step.size:
        raise ValueError(f"column {columns[step[0] + 1]} follows {columns[step[0]]}: expected ascending columns, each once")


def outlier_bytes(n: int, columns: int, indices: bool = True) -> dict[str, int]:
    """Bytes of `outliers` and (with `indices`) of `columns`, and of the last tile's padding, by kind."""
    stored = 2 * int(np.prod(layout.outliers_shape(n, columns)))
    weights = 2 * n * columns
    return {"outliers": weights + 4 * columns * indices, "padding": stored - weights}


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """`linear_nbit`'s reference without the columns, and their product in float64."""
    x, columns = np.asarray(inputs["x"], np.float32), inputs["columns"]
    check_columns(columns, attributes["k"])
    rest = x.copy()
    rest[..., columns] = 0
    y = linear_nbit.reference({**inputs, "x": rest}, attributes)
    weights = layout.unpack_outliers(inputs["outliers"], attributes["n"])
    return (y + x[..., columns].astype(np.float64) @ weights.astype(np.float64).T).astype(np.float32)


def random_outliers(rng: np.random.Generator, n: int, k: int, count: int) -> dict[str, np.ndarray]:
    """Random columns and their weights."""
    columns = np.sort(rng.choice(k, count, replace=False)).astype(np.int32)
    return {"columns": columns, "outliers": layout.pack_outliers(rng.uniform(-0.2, 0.2, (n, count)).astype(np.float32))}


def cases() -> Iterable[Case]:
    """Every width and kind of activation, the groups in turn: no columns, one, several, all of them."""
    rng = np.random.default_rng(2)
    shapes = [((1,), 33, 96, 3), ((2, 3), 47, 200, 7), ((5,), 16, 64, 0), ((1,), 1, 33, 33)]
    shapes += [((0,), 16, 64, 2), ((13,), 20, 300, 1)]
    number = 0
    for bits in BITS:
        for activation in Activation:
            for _ in range(3):
                (lead, n, k, count), format = shapes[number % 6], AffineFormat(bits, GROUPS[number % 4], number % 3 > 0)
                number += 1
                bias = rng.standard_normal(n).astype(np.float32) if number % 2 else None
                tensors, attributes = linear_nbit.random_weight(rng, n, k, format)
                tensors |= linear_nbit.random_range(rng, tensors, attributes, activation, number % 4 > 1)
                taken = random_outliers(rng, n, k, count)
                x = rng.standard_normal((*lead, k)).astype(np.float32)
                x[..., taken["columns"]] *= 30
                label = f"{format.label} {activation.label} x{list(x.shape)} n{n} {count} columns{' bias' if number % 2 else ''}"
                yield Case(label, {"x": x, **tensors, **taken, "bias": bias}, {**attributes, "activation": int(activation)})


LINEAR_MIXED = declare(
    OpSpec(
        name="linear_mixed",
        onnx_name="LinearMixed",
        doc="Y[..., n] = X'[..., k] · Wᵀ + X[..., columns] · outliersᵀ + bias; X' is X with 0 in the columns, W as in "
        f"LinearNBit, outliers packed as [tiles, columns, {TILE}].",
        inputs=(
            Input("x", "float32"),
            Input("codes", "uint8"),
            Input("scales", "float16"),
            Input("zeros", "uint8", optional=True),
            Input("columns", "int32"),
            Input("outliers", "float16"),
            Input("bias", "float32", optional=True),
            *linear_nbit.RANGE_INPUTS,
        ),
        attributes=("bits", "group", "n", "k", "activation", "layout_version"),
        output_shape=lambda shapes, attributes: (*shapes["x"][:-1], attributes["n"]),
        reference=reference,
        variant=linear_nbit.variant,
        cases=cases,
    )
)
