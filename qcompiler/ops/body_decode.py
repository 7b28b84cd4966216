"""Packed weights decoded by the nodes of a function body: codes, zero points, scales (docs/layout.md)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ops.body_builder import Body
from qcompiler.ops.formats import TILE, AffineFormat
from qcompiler.ops.layout import UNIT_K


def _signed_byte(b: Body, value: ir.Value) -> ir.Value:
    """uint8 that holds an int8, as float: flip the sign bit, subtract 128."""
    return b.op("Sub", b.to_float(b.op("BitwiseXor", value, b.constant(128, np.uint8))), b.constant(128, np.float32))


def vectors(b: Body, codes: ir.Value, count: int) -> list[ir.Value]:
    """The `count` vectors of 64 bytes of each unit: `[tiles, units, 64]`."""
    return [b.op("Slice", codes, b.ints(64 * i), b.ints(64 * i + 64), b.ints(2)) for i in range(count)]


def six_bits(b: Body, codes: ir.Value) -> list[ir.Value]:
    """The four vectors of 6-bit indices of units of 192 bytes: the fourth rides in the top bits of the others."""
    vector = vectors(b, codes, 3)
    top = [b.shift_right(v, 6) for v in vector]
    shifted = [b.shift_left(top[0], 4), b.shift_left(top[1], 2), top[2]]
    extra = b.op("Add", b.op("Add", shifted[0], shifted[1]), shifted[2])
    return [b.field(v, 0, 63) for v in vector] + [extra]


def decode_codes(b: Body, codes: ir.Value, bits: int) -> ir.Value:
    """uint8 `[tiles, units, unit_bytes]` -> codes as float `[tiles, 16, units * unit_k]`."""
    if bits == 8:
        fields = [codes]
    elif bits in (4, 2):
        fields = [b.field(codes, shift, 2**bits - 1) for shift in range(0, 8, bits)]
    else:
        fields = [b.field(i, shift, 7) for i in six_bits(b, codes) for shift in (0, 3)]
    parts = [b.op("Reshape", f, b.ints(0, 0, TILE, 4)) for f in fields]
    unit = b.op("Concat", *parts, axis=3) if len(parts) > 1 else parts[0]
    columns = b.op("Mul", b.op("Shape", codes, start=1, end=2), b.ints(UNIT_K[bits]))
    decoded = b.op("Reshape", b.op("Transpose", unit, perm=[0, 2, 1, 3]), b.tile_rows(columns))
    return _signed_byte(b, decoded) if bits == 8 else b.to_float(decoded)


def decode_zeros(b: Body, zeros: ir.Value, bits: int) -> ir.Value:
    """uint8 `[tiles, groups, 2 * bits]` -> zero points as float `[tiles, 16, groups]`."""
    if bits == 8:
        values = _signed_byte(b, zeros)
    elif bits in (4, 2):
        fields = [b.op("Unsqueeze", b.field(zeros, s, 2**bits - 1), b.ints(3)) for s in range(0, 8, bits)]
        values = b.to_float(b.op("Reshape", b.op("Concat", *fields, axis=3), b.ints(0, 0, TILE)))
    else:  # three bytes hold eight values
        wide = b.op("Cast", b.op("Reshape", zeros, b.ints(0, 0, 2, 3)), to=ir.DataType.UINT32)
        byte = [b.op("Slice", wide, b.ints(i), b.ints(i + 1), b.ints(3)) for i in range(3)]
        left = [byte[0]]
        left += [b.op("BitShift", byte[i], b.constant(8 * i, np.uint32), direction="LEFT") for i in (1, 2)]
        word = b.op("BitwiseOr", b.op("BitwiseOr", left[0], left[1]), left[2])
        fields = [b.field(word, 3 * i, 7, np.uint32) for i in range(8)]
        values = b.to_float(b.op("Reshape", b.op("Concat", *fields, axis=3), b.ints(0, 0, TILE)))
    return b.op("Transpose", values, perm=[0, 2, 1])


def spread(b: Body, per_group: ir.Value, group: int) -> ir.Value:
    """`[tiles, 16, groups]` -> one value a column, `[tiles, 16, k]`; one for the whole row broadcasts as it is."""
    if not group:
        return per_group
    wide = b.op("Expand", b.op("Unsqueeze", per_group, b.ints(3)), b.ints(1, 1, 1, group))
    columns = b.op("Mul", b.op("Shape", per_group, start=2, end=3), b.ints(group))
    return b.op("Slice", b.op("Reshape", wide, b.tile_rows(columns)), b.ints(0), b.attribute("k"), b.ints(2))


def decode_levels(b: Body, codes: ir.Value, zeros: ir.Value | None, format: AffineFormat) -> ir.Value:
    """The integers q − Z as float `[tiles, 16, k]`."""
    q = b.op("Slice", decode_codes(b, codes, format.bits), b.ints(0), b.attribute("k"), b.ints(2))
    if zeros is not None:
        return b.op("Sub", q, spread(b, decode_zeros(b, zeros, format.bits), format.group))
    return b.op("Sub", q, b.constant(format.center, np.float32)) if format.center else q


def decode_scales(b: Body, scales: ir.Value) -> ir.Value:
    """float16 `[tiles, groups, 16]` -> float `[tiles, 16, groups]`."""
    return b.op("Transpose", b.to_float(scales), perm=[0, 2, 1])


def decode_weight(b: Body, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, format: AffineFormat) -> ir.Value:
    """W = S · (q − Z) as float32 `[tiles, 16, k]`."""
    levels = decode_levels(b, codes, zeros, format)
    return b.op("Mul", levels, spread(b, decode_scales(b, scales), format.group))


def rows(b: Body, tiles: ir.Value, columns: ir.Value) -> ir.Value:
    """`[tiles, 16, columns]` -> `[n, columns]`."""
    flat = b.op("Reshape", tiles, b.op("Concat", b.ints(-1), columns, axis=0))
    return b.op("Slice", flat, b.ints(0), b.attribute("n"), b.ints(0))


NO_TILE = 2**40  # Gather refuses it


def wanted_tiles(b: Body, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The rows that an embedding is asked for, none negative, and the tile of each: int64 `[count]`."""
    flat, n = b.op("Reshape", indices, b.ints(-1)), b.attribute("n")
    row = b.op("Where", b.op("Less", flat, b.ints(0)), b.op("Add", flat, n), flat)
    # the last tile may have more rows than the matrix, and a row before the first would round to tile 0
    inside = b.op("And", b.op("GreaterOrEqual", row, b.ints(0)), b.op("Less", row, n))
    return row, b.op("Where", inside, b.op("Div", row, b.ints(TILE)), b.ints(NO_TILE))


def pick_rows(b: Body, weight: ir.Value, row: ir.Value, indices: ir.Value) -> ir.Value:
    """Of a tile for each of the rows, `[count, 16, k]`, that row, in the shape of `indices` and k."""
    inside = b.op("Unsqueeze", b.op("Mod", row, b.ints(TILE)), b.ints(1))
    picked = b.op("GatherND", weight, inside, batch_dims=1)
    return b.op("Reshape", picked, b.op("Concat", b.op("Shape", indices), b.attribute("k"), axis=0), allowzero=1)
