"""Function bodies of the ops on vector-quantized weights: look the indices up, then multiply as for any weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ops import body_edges
from qcompiler.ops.body_arithmetic import float_product, integer_product
from qcompiler.ops.body_builder import Body
from qcompiler.ops.body_decode import decode_scales, pick_rows, rows, six_bits, spread, vectors, wanted_tiles
from qcompiler.ops.formats import ACTIVATION_BLOCK, TILE, Activation, VqFormat
from qcompiler.ops.linear_vq import WEIGHT_INPUTS, activation_of, vq_format
from qcompiler.ops.spec import OpSpec


def _five_bits(b: Body, codes: ir.Value) -> list[ir.Value]:
    """The eight vectors of 5-bit indices of units of 320 bytes: three ride in the top bits of the five."""
    v = vectors(b, codes, 5)
    low = [b.shift_right(v[0], 5), b.shift_right(v[1], 5), b.shift_right(v[2], 5)]
    middle = [b.field(v[3], 5, 3), b.field(v[4], 5, 3), b.shift_right(v[3], 7)]
    extra = [b.op("Add", a, b.shift_left(m, 3)) for a, m in zip(low, middle, strict=True)]
    extra[2] = b.op("Add", extra[2], b.shift_left(b.shift_right(v[4], 7), 4))
    return [b.field(value, 0, 31) for value in v] + extra


def decode_indices(b: Body, codes: ir.Value, format: VqFormat) -> ir.Value:
    """uint8 `[tiles, units, unit_bytes]` -> int32 `[tiles, 16, spans, 4]`, the four vectors of each span."""
    bits = format.index_bits
    if bits == 5:
        index = _five_bits(b, codes)
    elif bits == 6:
        index = six_bits(b, codes)
    elif bits == 3:
        index = [b.field(pair, shift, 7) for pair in six_bits(b, codes) for shift in (0, 3)]
    elif bits == 8:
        index = [codes]
    else:
        index = [b.field(codes, shift, format.centroids - 1) for shift in range(0, 8, bits)]
    parts = [b.op("Reshape", i, b.ints(0, 0, TILE, 4)) for i in index]
    unit = b.op("Transpose", b.op("Concat", *parts, axis=3), perm=[0, 2, 1, 3])  # [tiles, 16, units, 4 · spans of a unit]
    spans = b.op("Mul", b.dimension(codes, 1), b.ints(len(index)))
    shape = b.op("Concat", b.tile_rows(spans), b.ints(4), axis=0)
    return b.op("Cast", b.op("Reshape", unit, shape), to=ir.DataType.INT32)


def _count(b: Body, length: ir.Value) -> ir.Value:
    """0, 1, … below `length`, which is `[1]`."""
    scalar = b.op("Squeeze", length, b.ints(0))
    return b.op("Range", b.constant(0, np.int64), scalar, b.constant(1, np.int64))


def decode_entries(b: Body, codes: ir.Value, codebooks: ir.Value, down: ir.Value | None, format: VqFormat) -> ir.Value:
    """The entries as float `[tiles, 16, k]`; `down`: row of codebooks of each tile, None where there is one."""
    index = decode_indices(b, codes, format)
    spans = b.dimension(index, 2)
    first = None  # entry of the table at which the codebook of a tile and span begins
    if format.block_columns:
        # a span lies within one codebook: it divides 128
        first = b.op("Div", _count(b, spans), b.ints(format.block_columns // format.span))
    if down is not None:
        before = b.op("Unsqueeze", b.op("Mul", down, b.dimension(codebooks, 1)), b.ints(1))
        first = before if first is None else b.op("Add", before, first)
    if first is not None:
        entry = b.op("Cast", b.op("Mul", first, b.ints(format.centroids)), to=ir.DataType.INT32)
        axes = b.ints(1, 3) if down is not None else b.ints(0, 1, 3)
        index = b.op("Add", index, b.op("Unsqueeze", entry, axes))
    table = b.op("Reshape", b.op("Transpose", codebooks, perm=[0, 1, 3, 2]), b.ints(-1, format.dim))
    found = b.op("Gather", table, index, axis=0)  # [tiles, 16, spans, 4, dim]
    columns = b.op("Mul", spans, b.ints(format.span))
    natural = b.op("Reshape", b.op("Transpose", found, perm=[0, 1, 2, 4, 3]), b.tile_rows(columns))
    return b.op("Slice", b.to_float(natural), b.ints(0), b.attribute("k"), b.ints(2))


def decode_factors(b: Body, codebook_scales: ir.Value, scales: ir.Value, down: ir.Value | None, format: VqFormat) -> ir.Value:
    """S · c as float `[tiles, 16, segments]`, exact; one for the whole row where neither S nor c changes along it."""
    shared = codebook_scales if down is None else b.op("Gather", codebook_scales, down, axis=0)  # [tiles, across]
    if format.block_columns:
        width = format.group or ACTIVATION_BLOCK
        k = b.attribute("k")
        segments = b.op("Div", b.op("Add", k, b.ints(width - 1)), b.ints(width))
        across = b.op("Div", _count(b, segments), b.ints(format.block_columns // width))
        shared = b.op("Gather", shared, across, axis=1)
    return b.op("Mul", decode_scales(b, scales), b.op("Unsqueeze", b.to_float(shared), b.ints(1)))


def _weight(b: Body, levels: ir.Value, factors: ir.Value, format: VqFormat) -> ir.Value:
    """W = (S · c) · C[index] as float `[tiles, 16, k]`."""
    width = format.group or (ACTIVATION_BLOCK if format.block_columns else 0)
    return b.op("Mul", levels, spread(b, factors, width))


def _down(b: Body, tile: ir.Value, format: VqFormat) -> ir.Value | None:
    return b.op("Div", tile, b.ints(format.block_rows // TILE)) if format.block_rows else None


def linear_vq(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `LinearVQ` for one variant."""
    b, format = Body(spec.attributes, overload), vq_format(attributes)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    codes, codebooks, codebook_scales, scales = (inputs[i.name] for i in WEIGHT_INPUTS)
    x = body_edges.normalized(b, inputs, present)
    down = _down(b, _count(b, b.dimension(codes, 0)), format)
    levels = decode_entries(b, codes, codebooks, down, format)
    factors = decode_factors(b, codebook_scales, scales, down, format)
    if activation_of(attributes) is Activation.FLOAT:
        y = float_product(b, x, rows(b, _weight(b, levels, factors, format), b.attribute("k")))
    else:
        segments = rows(b, factors, b.dimension(factors, 2))
        levels = rows(b, levels, b.attribute("k"))
        y = integer_product(b, x, levels, segments, format, Activation.INT8_BLOCK)
    if "bias" in present:
        y = b.op("Add", y, inputs["bias"])
    y = body_edges.finished(b, y, inputs, attributes, present)
    return b.function(spec, overload, list(inputs.values()), y)


def embedding_vq(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `EmbeddingVQ` for one variant: only the tiles that are asked for are decoded."""
    b, format = Body(spec.attributes, overload), vq_format(attributes)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    row, tile = wanted_tiles(b, inputs["indices"])
    down = _down(b, tile, format)
    codes, scales = (b.op("Gather", inputs[name], tile, axis=0) for name in ("codes", "scales"))
    levels = decode_entries(b, codes, inputs["codebooks"], down, format)
    factors = decode_factors(b, inputs["codebook_scales"], scales, down, format)
    y = pick_rows(b, _weight(b, levels, factors, format), row, inputs["indices"])
    return b.function(spec, overload, list(inputs.values()), y)
