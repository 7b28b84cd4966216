"""`linear_vq`: y = x · Wᵀ (+ bias) with a packed vector-quantized weight, and its edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qcompiler.ops import layout, linear_edges, vq_layout
from qcompiler.ops.formats import ACTIVATION_BLOCK, CENTROIDS, GROUPS, LAYOUT_VERSION, Activation, VqFormat
from qcompiler.ops.linear_nbit import quantize_activations
from qcompiler.ops.packing import format_of
from qcompiler.ops.spec import Case, Input, OpSpec, declare

ACTIVATIONS = (Activation.FLOAT, Activation.INT8_BLOCK)

WEIGHT_INPUTS = (
    Input("codes", "uint8"),
    Input("codebooks", "int8"),
    Input("codebook_scales", "float16"),
    Input("scales", "float16"),
)
WEIGHT_ATTRIBUTES = ("dim", "centroids", "block_rows", "block_columns", "group", "n", "k")


def activation_of(attributes: Mapping[str, int]) -> Activation:
    """The activations of the op.

    Raises:
        ValueError: of a kind that it does not take.
    """
    activation = Activation(attributes["activation"])
    if activation not in ACTIVATIONS:
        taken = ", ".join(a.label for a in ACTIVATIONS)
        raise ValueError(f"linear_vq takes activations {taken}, not {activation.label}")
    return activation


def vq_format(attributes: Mapping[str, int]) -> VqFormat:
    """The format in the op's attributes."""
    format = format_of(attributes)
    assert isinstance(format, VqFormat)
    return format


def unpack(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The codebook entries and their factors S · c, both float32 `[n, k]`, of a packed weight."""
    n, k, format = attributes["n"], attributes["k"], vq_format(attributes)
    indices = vq_layout.unpack_indices(inputs["codes"], n, k, format)
    levels = vq_layout.levels(indices, vq_layout.unpack_codebooks(inputs["codebooks"]), k, format)
    scales = layout.unpack_scales(inputs["scales"], n)
    return levels.astype(np.float32), vq_layout.factors(inputs["codebook_scales"], scales, k, format)


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """The arithmetic of docs/layout.md, segment by segment, accumulated in float64."""
    x = linear_edges.normalized(inputs, attributes)
    n, k, group = attributes["n"], attributes["k"], attributes["group"]
    levels, factors = unpack(inputs, attributes)
    rows = x.reshape(-1, k)
    if activation_of(attributes) is Activation.FLOAT:
        a, sa = rows, np.ones_like(rows)
    else:
        a, sa = quantize_activations(rows, Activation.INT8_BLOCK)
    segment = group or ACTIVATION_BLOCK
    y = np.zeros((rows.shape[0], n))
    for start in range(0, k, segment):
        part = slice(start, min(start + segment, k))
        dot = a[:, part].astype(np.float64) @ levels[:, part].astype(np.float64).T
        y += dot * (factors[:, start].astype(np.float64) * sa[:, start, None].astype(np.float64))
    if inputs.get("bias") is not None:
        y += inputs["bias"]
    return linear_edges.finished(y.astype(np.float32).reshape(*x.shape[:-1], n), inputs, attributes)


def variant(attributes: Mapping[str, int], present: frozenset[str]) -> str:
    """For instance `vq2d64-b32x256-g128_int8-block128_bias`.

    Raises:
        ValueError: activations that the op does not take, edges that do not fit.
    """
    parts = [vq_format(attributes).label, activation_of(attributes).label]
    return "_".join(parts + ["bias"] * ("bias" in present) + linear_edges.words(attributes, present))


def random_weight(rng: np.random.Generator, n: int, k: int, format: VqFormat) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A random packed weight over all indices and all of int8: its tensors and attributes (for tests and benchmarks)."""
    blocks = format.blocks(n, k)
    tensors = vq_layout.pack(
        rng.integers(0, format.centroids, (n, format.vectors(k)), np.uint8),
        rng.integers(-128, 128, (*blocks, format.centroids, format.dim), np.int8),
        rng.uniform(0.1, 2, blocks),
        rng.uniform(0.001, 0.01, (n, format.groups(k))),
        k,
        format,
    )
    values = (format.dim, format.centroids, format.block_rows, format.block_columns, format.group, n, k)
    return tensors, {**dict(zip(WEIGHT_ATTRIBUTES, values, strict=True)), "layout_version": LAYOUT_VERSION}


# Codebooks of a tile or of several, of an activation block or of two, of all rows or columns.
SIDES = ((16, 128), (32, 256), (0, 128), (0, 0), (16, 0))


def formats() -> Iterator[VqFormat]:
    """Every vector, number of centroids and group, with blocks of every kind in turn."""
    number = 0
    for dim, counts in CENTROIDS.items():
        for centroids in counts:
            for group in GROUPS:
                yield VqFormat(dim, centroids, *SIDES[number % len(SIDES)], group)
                number += 1


# One row and several, none; whole and short tiles, groups, spans, units and blocks of a codebook.
SHAPES = (((1,), 16, 128), ((3,), 33, 96), ((2, 5), 47, 300), ((20,), 64, 256), ((1,), 1, 33), ((0,), 16, 64), ((2,), 80, 515))


def _plain_case(rng: np.random.Generator, lead: tuple[int, ...], n: int, k: int, number: int) -> Case:
    """Formats and activations in turn, with codebooks that end where a half does not too."""
    known = list(formats())
    format, activation = known[5 * number % len(known)], ACTIVATIONS[number % 2]
    tensors, attributes = random_weight(rng, n, k, format)
    x = rng.standard_normal((*lead, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if number % 3 else None
    label = f"{format.label} {activation.label} x{list(x.shape)} n{n}{'' if bias is None else ' bias'}"
    return Case(label, {"x": x, **tensors, "bias": bias}, {**attributes, "activation": int(activation)})


def cases() -> Iterable[Case]:
    """Every format with both activations on two of the shapes each, in turn, and the edges."""
    yield from _cases()
    yield from linear_edges.cases(_plain_case)


def _cases() -> Iterable[Case]:
    rng = np.random.default_rng(4)
    number = 0
    for format in formats():
        for activation in ACTIVATIONS:
            for _ in range(2):
                lead, n, k = SHAPES[number % len(SHAPES)]
                number += 1
                tensors, attributes = random_weight(rng, n, k, format)
                x = rng.standard_normal((*lead, k)).astype(np.float32)
                bias = rng.standard_normal(n).astype(np.float32) if number % 3 else None
                attributes["activation"] = int(activation)
                label = f"{format.label} {activation.label} x{list(x.shape)} n{n}{' bias' if number % 3 else ''}"
                yield Case(label, {"x": x, **tensors, "bias": bias}, attributes)


LINEAR_VQ = declare(
    OpSpec(
        name="linear_vq",
        onnx_name="LinearVQ",
        doc="Y[..., n] = X[..., k] · Wᵀ + bias, W[n, k] = S · c · C[index], indices packed in layout W16x4. The edges norm, "
        "gate and residual are those of LinearNBit.",
        inputs=(Input("x", "float32"), *WEIGHT_INPUTS, Input("bias", "float32", optional=True), *linear_edges.INPUTS),
        attributes=(*WEIGHT_ATTRIBUTES, "activation", "layout_version", *linear_edges.DEFAULTS),
        output_shape=lambda shapes, attributes: (*shapes["x"][:-1], linear_edges.output_columns(attributes)),
        defaults=linear_edges.DEFAULTS,
        reference=reference,
        variant=variant,
        cases=cases,
    )
)
