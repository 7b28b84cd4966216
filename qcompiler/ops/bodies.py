"""ONNX function bodies: what a stock runtime executes in place of our kernels.

A body decodes the packed weight with standard ops (opset 21) and multiplies. It is there so that a file runs anywhere
and can be checked; it is slow, and a runtime may fold the decoding into a dense weight at load. One body a variant (an
`overload` of the function); sizes come from attributes.

ONNX Runtime before 1.27 ignores `overload` and would run one variant's body for every node, silently wrong. So node
and body of a variant share an attribute of its name, without which the body does not resolve: such a runtime refuses
the file instead.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ops.activation_range import INPUTS
from qcompiler.ops.body_arithmetic import StaticRange, add_outliers, float_product, integer_product, without_columns
from qcompiler.ops.body_builder import Body
from qcompiler.ops.formats import TILE, Activation, AffineFormat
from qcompiler.ops.layout import UNIT_K
from qcompiler.ops.spec import OpSpec


def _signed_byte(b: Body, value: ir.Value) -> ir.Value:
    """uint8 that holds an int8, as float: flip the sign bit, subtract 128."""
    return b.op("Sub", b.to_float(b.op("BitwiseXor", value, b.constant(128, np.uint8))), b.constant(128, np.float32))


def decode_codes(b: Body, codes: ir.Value, bits: int) -> ir.Value:
    """uint8 `[tiles, units, unit_bytes]` -> codes as float `[tiles, 16, units * unit_k]`."""
    if bits == 8:
        fields = [codes]
    elif bits in (4, 2):
        fields = [b.field(codes, shift, 2**bits - 1) for shift in range(0, 8, bits)]
    else:
        vector = [b.op("Slice", codes, b.ints(64 * i), b.ints(64 * i + 64), b.ints(2)) for i in range(3)]
        top = [b.shift_right(v, 6) for v in vector]
        shifted = [b.op("Mul", top[i], b.constant(by, np.uint8)) for i, by in ((0, 16), (1, 4))] + [top[2]]
        extra = b.op("Add", b.op("Add", shifted[0], shifted[1]), shifted[2])
        index = [b.op("BitwiseAnd", v, b.constant(63, np.uint8)) for v in vector] + [extra]
        fields = [b.field(i, shift, 7) for i in index for shift in (0, 3)]
    parts = [b.op("Reshape", f, b.ints(0, 0, TILE, 4)) for f in fields]
    unit = b.op("Concat", *parts, axis=3) if len(parts) > 1 else parts[0]
    columns = b.op("Mul", b.op("Shape", codes, start=1, end=2), b.ints(UNIT_K[bits]))
    rows = b.op("Reshape", b.op("Transpose", unit, perm=[0, 2, 1, 3]), b.tile_rows(columns))
    return _signed_byte(b, rows) if bits == 8 else b.to_float(rows)


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


def _spread(b: Body, per_group: ir.Value, group: int) -> ir.Value:
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
        return b.op("Sub", q, _spread(b, decode_zeros(b, zeros, format.bits), format.group))
    return b.op("Sub", q, b.constant(format.center, np.float32)) if format.center else q


def decode_scales(b: Body, scales: ir.Value) -> ir.Value:
    """float16 `[tiles, groups, 16]` -> float `[tiles, 16, groups]`."""
    return b.op("Transpose", b.to_float(scales), perm=[0, 2, 1])


def decode_weight(b: Body, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, format: AffineFormat) -> ir.Value:
    """W = S · (q − Z) as float32 `[tiles, 16, k]`."""
    levels = decode_levels(b, codes, zeros, format)
    return b.op("Mul", levels, _spread(b, decode_scales(b, scales), format.group))


def _rows(b: Body, tiles: ir.Value, columns: ir.Value) -> ir.Value:
    """`[tiles, 16, columns]` -> `[n, columns]`."""
    rows = b.op("Reshape", tiles, b.op("Concat", b.ints(-1), columns, axis=0))
    return b.op("Slice", rows, b.ints(0), b.attribute("n"), b.ints(0))


def linear_nbit(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `LinearNBit` for one variant."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    x, codes, scales = inputs["x"], inputs["codes"], inputs["scales"]
    zeros = inputs["zeros"] if "zeros" in present else None
    y = _product(b, x, codes, scales, zeros, attributes, _static_range(inputs, present))
    if "bias" in present:
        y = b.op("Add", y, inputs["bias"])
    return b.function(spec, overload, list(inputs.values()), y)


def _product(
    b: Body,
    x: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    attributes: dict[str, int],
    static: StaticRange | None = None,
) -> ir.Value:
    """x · Wᵀ with one packed matrix."""
    format = AffineFormat(attributes["bits"], attributes["group"], zeros is None)
    activation = Activation(attributes["activation"])
    if activation is Activation.FLOAT:
        return float_product(b, x, _rows(b, decode_weight(b, codes, scales, zeros, format), b.attribute("k")))
    levels = _rows(b, decode_levels(b, codes, zeros, format), b.attribute("k"))
    factors = decode_scales(b, scales)
    return integer_product(b, x, levels, _rows(b, factors, b.dimension(factors, 2)), format, activation, static)


def _static_range(inputs: dict[str, ir.Value], present: frozenset[str]) -> StaticRange | None:
    scale, zero, offset = (inputs[name] if name in present else None for name in INPUTS)
    return None if scale is None else StaticRange(scale, zero, offset)


def linear_mixed(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `LinearMixed` for one variant."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    x, codes, scales, columns = inputs["x"], inputs["codes"], inputs["scales"], inputs["columns"]
    zeros = inputs["zeros"] if "zeros" in present else None
    flat = b.reshape(x, b.op("Div", b.op("Size", x), b.attribute("k")), b.attribute("k"))
    rest = without_columns(b, flat, columns)
    y = _product(b, rest, codes, scales, zeros, attributes, _static_range(inputs, present))
    if "bias" in present:
        y = b.op("Add", y, inputs["bias"])
    y = add_outliers(b, y, flat, columns, inputs["outliers"])
    lead = b.op("Slice", b.op("Shape", x), b.ints(0), b.ints(-1))
    return b.function(spec, overload, list(inputs.values()), b.reshape(y, lead, b.attribute("n")))


def linear_experts_nbit(
    spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]
) -> ir.Function:
    """The body of `LinearExpertsNBit` for one variant: row by row, the matrix of the row's expert decoded each time."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    x, expert = inputs["x"], inputs["expert"]
    # Gather takes -1 for the last: a negative index is made one that it refuses.
    checked = b.op("Where", b.op("Less", expert, b.ints(0)), b.attribute("experts"), expert)
    # ONNX Runtime's Scan refuses to run over nothing: a row of zeros goes behind the others, and its result is dropped.
    zero = b.op("Expand", b.constant(0, np.float32), b.op("Concat", b.ints(1), b.attribute("k"), axis=0))
    scanned = [b.op("Concat", x, zero, axis=0), b.op("Concat", checked, b.ints(0), axis=0)]
    scanned[0].dtype, scanned[1].dtype = ir.DataType.FLOAT, ir.DataType.INT64
    by_expert = {
        name: b.op("Reshape", inputs[name], b.op("Concat", b.attribute("experts"), b.ints(-1), last, axis=0))
        for name in ("codes", "scales", "zeros")
        if name in present
        for last in [b.op("Shape", inputs[name], start=1)]
    }

    def row(step: Body, x: ir.Value, expert: ir.Value) -> ir.Value:
        own = {name: step.op("Gather", value, expert, axis=0) for name, value in by_expert.items()}
        one = step.op("Unsqueeze", x, step.ints(0))
        y = _product(step, one, own["codes"], own["scales"], own.get("zeros"), attributes)
        return step.op("Squeeze", y, step.ints(0))

    y = b.op("Slice", b.rows(scanned, row), b.ints(0), b.ints(-1), b.ints(0))
    if "bias" in present:
        y = b.op("Add", y, b.op("Gather", inputs["bias"], checked, axis=0))
    return b.function(spec, overload, list(inputs.values()), y)


def embedding_nbit(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `EmbeddingNBit` for one variant: only the tiles that are asked for are decoded."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    format = AffineFormat(attributes["bits"], attributes["group"], "zeros" not in present)
    flat = b.op("Reshape", inputs["indices"], b.ints(-1))
    below = b.op("Less", flat, b.ints(0))
    row = b.op("Where", below, b.op("Add", flat, b.attribute("n")), flat)
    tile = b.op("Div", row, b.ints(TILE))
    gathered = [b.op("Gather", inputs[name], tile, axis=0) for name in ("codes", "scales")]
    zeros = b.op("Gather", inputs["zeros"], tile, axis=0) if "zeros" in present else None
    weight = decode_weight(b, gathered[0], gathered[1], zeros, format)
    inside = b.op("Unsqueeze", b.op("Mod", row, b.ints(TILE)), b.ints(1))
    rows = b.op("GatherND", weight, inside, batch_dims=1)
    y = b.op("Reshape", rows, b.op("Concat", b.op("Shape", inputs["indices"]), b.attribute("k"), axis=0), allowzero=1)
    return b.function(spec, overload, list(inputs.values()), y)


BUILDERS = {
    "linear_nbit": linear_nbit,
    "linear_mixed": linear_mixed,
    "linear_experts_nbit": linear_experts_nbit,
    "embedding_nbit": embedding_nbit,
}
