"""The product in a function body, in the arithmetic of docs/layout.md.

With int8 activations it gives the same bits as the kernels. It must: one bit in one product flips roundings to int8
further on, and a few layers later the logits of two runtimes are visibly apart. With float activations agreement to
rounding stays agreement to rounding, and a plain product is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ops.body_builder import Body, Nodes
from qcompiler.ops.formats import ACTIVATION_BLOCK, Activation, AffineFormat, WeightFormat

LARGEST_ACTIVATION = 127
LARGEST_MAGNITUDE = 128  # of a static activation with a zero point
EXACT = 2**24  # whole numbers up to here, and their sums in any order, are exact in float32


def float_product(b: Body, x: ir.Value, weight: ir.Value) -> ir.Value:
    """x · Wᵀ, `weight` is `[n, k]`."""
    return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))


@dataclass(frozen=True)
class StaticRange:
    """Static activations: `scale` float `[1]`; `zero` int8 `[1]` and `offset` float `[n]`, or None where symmetric."""

    scale: ir.Value
    zero: ir.Value | None
    offset: ir.Value | None


def integer_product(
    b: Body,
    x: ir.Value,
    levels: ir.Value,
    scales: ir.Value,
    format: WeightFormat,
    activation: Activation,
    static: StaticRange | None = None,
) -> ir.Value:
    """x · Wᵀ with x rounded to int8.

    Args:
        b: where the nodes go.
        x: `[..., k]`.
        levels: the integers q − Z, or entries of codebooks, as float, `[n, k]`.
        scales: S as float, `[n, groups]`; with a group for the whole row also one for each block of activations.
        format: of the weight.
        activation: one of the int8 formats; with codebooks `INT8_BLOCK`.
        static: the range, with static activations.
    """
    k, n = b.attribute("k"), b.attribute("n")
    rows = b.op("Div", b.op("Size", x), k)
    flat = b.reshape(x, rows, k)
    start = b.op("Concat", rows, n, axis=0)
    if activation is Activation.INT8_BLOCK:
        y = _segments(b, flat, None, levels, scales, format, start)
    else:
        rounded = quantize(b, flat) if static is None else quantize_static(b, flat, static)
        assert isinstance(format, AffineFormat)  # codebooks meet INT8_BLOCK alone
        if format.group:
            y = _segments(b, flat, rounded, levels, scales, format, start)
        else:
            y = _whole_row(b, rounded, levels, scales, format, start)
    if static is not None and static.offset is not None:
        y = b.op("Add", y, static.offset)
    lead = b.op("Slice", b.op("Shape", x), b.ints(0), b.ints(-1))
    return b.reshape(y, lead, n)


def _segments(
    b: Body,
    x: ir.Value,
    rounded: tuple[ir.Value, ir.Value] | None,
    levels: ir.Value,
    scales: ir.Value,
    format: WeightFormat,
    shape: ir.Value,
) -> ir.Value:
    """acc = fmaf(dot, S · sa, acc), segment by segment; `rounded`: integers and a scale a row, None: a scale a block."""
    # A group is never longer than a block, so the segments are the groups, or the blocks where the group is the row.
    width, k = format.group or ACTIVATION_BLOCK, b.attribute("k")
    count = _ceil_div(b, k, b.ints(width))
    columns = b.op("Mul", count, b.ints(width))
    if rounded is not None:
        a, sa = rounded
        a = _pad(b, a, k, columns)
        sa = b.op("Unsqueeze", sa, b.ints(0))
        sa = b.op("Expand", sa, b.op("Concat", count, b.ints(1, 1), axis=0))
    else:
        blocks, size = _ceil_div(b, k, b.ints(ACTIVATION_BLOCK)), b.ints(ACTIVATION_BLOCK)
        padded = _pad(b, x, k, b.op("Mul", blocks, size))
        a, sa = quantize(b, b.reshape(padded, b.dimension(x, 0), blocks, size))
        a = b.reshape(a, b.dimension(x, 0), b.op("Mul", blocks, size))
        sa = b.op("Transpose", sa, perm=[1, 0, 2])
        if width != ACTIVATION_BLOCK:
            a = b.op("Slice", a, b.ints(0), columns, b.ints(1))
            sa = b.op("Gather", sa, _block_of_segment(b, count, ACTIVATION_BLOCK // width), axis=0)
    s = b.op("Unsqueeze", b.op("Transpose", scales, perm=[1, 0]), b.ints(1))
    if not format.group:
        s = b.op("Expand", s, b.op("Concat", count, b.ints(1, 1), axis=0))
    zero = b.op("Expand", b.constant(0, np.float32), shape)
    scanned = [*_split(b, a, levels, count, b.ints(width)), s, sa]
    return b.fold(ir.DataType.FLOAT, zero, scanned, _fused_multiply_add)


def _fused_multiply_add(
    step: Nodes, acc: ir.Value, a: ir.Value, levels: ir.Value, s: ir.Value, sa: ir.Value
) -> ir.Value:
    """One segment: at most 128 columns, whose sum is exact in float32.

    In float64 the product of two float32 is exact, and nearly always so is its sum with a third: the spread of their
    exponents has to pass 2^29 before a bit is lost. Where one is, this differs from a fused multiply-add only if the
    rounded sum then falls on the middle of two float32, once in 2^29.
    """
    dot = step.to_double(step.op("MatMul", a, levels))
    factor = step.to_double(step.op("Mul", s, sa))
    return step.to_float(step.op("Add", step.op("Mul", dot, factor), step.to_double(acc)))


def _whole_row(
    b: Body,
    rounded: tuple[ir.Value, ir.Value],
    levels: ir.Value,
    scales: ir.Value,
    format: AffineFormat,
    shape: ir.Value,
) -> ir.Value:
    """dot · (S · sa) with one segment a row, whose sum is put together from parts that are exact in float32."""
    a, sa = rounded
    k = b.attribute("k")
    longest = EXACT // ((2**format.bits - 1) * LARGEST_MAGNITUDE)
    count = _ceil_div(b, k, b.ints(longest))
    width = _ceil_div(b, k, count)
    a = _pad(b, a, k, b.op("Mul", count, width))
    zero = b.op("Expand", b.constant(0, np.float64), shape)
    dot = b.fold(ir.DataType.DOUBLE, zero, _split(b, a, levels, count, width), _exact_sum)
    return b.op("Mul", b.to_float(dot), b.op("Mul", b.op("Transpose", scales, perm=[1, 0]), sa))


def _exact_sum(step: Nodes, acc: ir.Value, a: ir.Value, levels: ir.Value) -> ir.Value:
    return step.op("Add", acc, step.to_double(step.op("MatMul", a, levels)))


def quantize(b: Body, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Integers `a` as float, and their scale, absmax / 127 over the last dimension, which is kept."""
    largest = b.constant(LARGEST_ACTIVATION, np.float32)
    # ONNX Runtime's ReduceMax leaves the shape of a tensor without elements as it is; the slice makes it [..., 1]
    absmax = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    scale = b.op("Div", b.op("Slice", absmax, b.ints(0), b.ints(1), b.ints(-1)), largest)
    # x / 1 rounds to 0 wherever the scale is 0, also where it underflowed
    safe = b.op("Where", b.op("Equal", scale, b.constant(0, np.float32)), b.constant(1, np.float32), scale)
    rounded = b.op("Round", b.op("Div", x, safe))
    return b.op("Clip", rounded, b.op("Neg", largest), largest), scale


def quantize_static(b: Body, x: ir.Value, static: StaticRange) -> tuple[ir.Value, ir.Value]:
    """Integers as float with a scale and zero point that are given; the scale `[rows, 1]` is NaN for rows not finite."""
    rounded = b.op("Round", b.op("Div", x, static.scale))
    smallest = -LARGEST_ACTIVATION
    if static.zero is not None:
        rounded, smallest = b.op("Add", rounded, b.to_float(static.zero)), -LARGEST_MAGNITUDE
    a = b.op("Clip", rounded, b.constant(smallest, np.float32), b.constant(LARGEST_ACTIVATION, np.float32))
    # infinity · 0 is NaN; clipping alone would let it pass
    nothing = b.op("ReduceSum", b.op("Mul", x, b.constant(0, np.float32)), b.ints(-1), keepdims=1)
    return a, b.op("Add", b.op("Slice", nothing, b.ints(0), b.ints(1), b.ints(-1)), static.scale)


def add_outliers(b: Body, y: ir.Value, x: ir.Value, columns: ir.Value, outliers: ir.Value) -> ir.Value:
    """y + x[:, columns] · outliersᵀ, column by column, product and sum each rounded.

    Args:
        b: where the nodes go.
        y: `[rows, n]`.
        x: `[rows, k]`.
        columns: int32 `[count]`.
        outliers: float16 `[tiles, count, 16]`.
    """
    rows, count, n = b.dimension(x, 0), b.dimension(columns, 0), b.attribute("n")
    taken = b.op("Transpose", b.op("Gather", x, columns, axis=1), perm=[1, 0])
    weights = b.op("Transpose", b.to_float(outliers), perm=[1, 0, 2])
    lanes = b.op("Mul", b.dimension(weights, 1), b.dimension(weights, 2))
    weights = b.op("Slice", b.reshape(weights, count, lanes), b.ints(0), n, b.ints(1))
    # ONNX Runtime's Scan refuses to run over nothing: a column of zeros goes behind the others
    scanned = []
    for value, width in ((taken, rows), (weights, n)):
        nothing = b.op("Expand", b.constant(0, np.float32), b.op("Concat", b.ints(1), width, axis=0))
        scanned.append(b.op("Concat", value, nothing, axis=0))
    scanned = [b.op("Unsqueeze", scanned[0], b.ints(2)), b.op("Unsqueeze", scanned[1], b.ints(1))]
    return b.fold(ir.DataType.FLOAT, y, scanned, lambda step, acc, a, w: step.op("Add", acc, step.op("Mul", a, w)))


def without_columns(b: Body, x: ir.Value, columns: ir.Value) -> ir.Value:
    """x `[rows, k]` with 0 in the columns; NaN where such a value was not finite."""
    ones = b.op("Expand", b.constant(1, np.float32), b.attribute("k"))
    zeros = b.op("Expand", b.constant(0, np.float32), b.dimension(columns, 0))
    return b.op("Mul", x, b.op("ScatterElements", ones, columns, zeros, axis=0))


def _split(b: Body, a: ir.Value, levels: ir.Value, count: ir.Value, width: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Activations `[rows, count · width]`, levels `[n, k]` by segment: `[count, rows, width]`, `[count, width, n]`."""
    parts = b.op("Transpose", b.reshape(a, b.dimension(a, 0), count, width), perm=[1, 0, 2])
    wide = _pad(b, levels, b.attribute("k"), b.op("Mul", count, width))
    return parts, b.op("Transpose", b.reshape(wide, b.attribute("n"), count, width), perm=[1, 2, 0])


def _block_of_segment(b: Body, count: ir.Value, segments: int) -> ir.Value:
    """Index of the activation block of each of `count` segments, `segments` of which make a block."""
    scalar = b.op("Squeeze", count, b.ints(0))
    index = b.op("Range", b.constant(0, np.int64), scalar, b.constant(1, np.int64))
    return b.op("Div", index, b.ints(segments))


def _pad(b: Body, value: ir.Value, columns: ir.Value, wanted: ir.Value) -> ir.Value:
    """Zeros at the end of the last dimension, from `columns` to `wanted`."""
    amount = b.op("Concat", b.ints(0), b.op("Sub", wanted, columns), axis=0)
    return b.op("Pad", value, amount, b.constant(0, np.float32), b.ints(-1))


def _ceil_div(b: Body, value: ir.Value, divisor: ir.Value) -> ir.Value:
    return b.op("Div", b.op("Sub", b.op("Add", value, divisor), b.ints(1)), divisor)
