"""The product in a function body, in the arithmetic of docs/layout.md.

With int8 activations it gives the same bits as the kernels. It must: one bit in one product flips roundings to int8
further on, and a few layers later the logits of two runtimes are visibly apart. With float activations agreement to
rounding stays agreement to rounding, and a plain product is enough.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ops.body_builder import Body, Nodes
from qcompiler.ops.formats import ACTIVATION_BLOCK, Activation, AffineFormat

LARGEST_ACTIVATION = 127
EXACT = 2**24  # whole numbers up to here, and their sums in any order, are exact in float32


def float_product(b: Body, x: ir.Value, weight: ir.Value) -> ir.Value:
    """x · Wᵀ, `weight` is `[n, k]`."""
    return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))


def integer_product(
    b: Body, x: ir.Value, levels: ir.Value, scales: ir.Value, format: AffineFormat, activation: Activation
) -> ir.Value:
    """x · Wᵀ with x rounded to int8.

    Args:
        b: where the nodes go.
        x: `[..., k]`.
        levels: the integers q − Z as float, `[n, k]`.
        scales: S as float, `[n, groups]`.
        format: of the weight.
        activation: one of the int8 formats.
    """
    k, n = b.attribute("k"), b.attribute("n")
    rows = b.op("Div", b.op("Size", x), k)
    flat = b.reshape(x, rows, k)
    start = b.op("Concat", rows, n, axis=0)
    if format.group or activation is Activation.INT8_BLOCK:
        y = _segments(b, flat, levels, scales, format, activation, start)
    else:
        y = _whole_row(b, flat, levels, scales, format, start)
    lead = b.op("Slice", b.op("Shape", x), b.ints(0), b.ints(-1))
    return b.reshape(y, lead, n)


def _segments(
    b: Body,
    x: ir.Value,
    levels: ir.Value,
    scales: ir.Value,
    format: AffineFormat,
    activation: Activation,
    shape: ir.Value,
) -> ir.Value:
    """acc = fmaf(dot, S · sa, acc), segment by segment."""
    # A group is never longer than a block, so the segments are the groups, or the blocks where the group is the row.
    width, k = format.group or ACTIVATION_BLOCK, b.attribute("k")
    count = _ceil_div(b, k, b.ints(width))
    columns = b.op("Mul", count, b.ints(width))
    if activation is Activation.INT8_TOKEN:
        a, sa = quantize(b, x)
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
    b: Body, x: ir.Value, levels: ir.Value, scales: ir.Value, format: AffineFormat, shape: ir.Value
) -> ir.Value:
    """dot · (S · sa) with one segment a row, whose sum is put together from parts that are exact in float32."""
    a, sa = quantize(b, x)
    k = b.attribute("k")
    longest = EXACT // ((2**format.bits - 1) * LARGEST_ACTIVATION)
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
