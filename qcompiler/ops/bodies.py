"""ONNX function bodies: what a stock runtime executes in place of our kernels.

A body decodes the packed weight with standard ops (opset 21) and multiplies in float32, with the activations quantized and
dequantized as the kernel does. It is there so that a file runs anywhere and can be checked; it is slow, and a runtime may fold
the decoding into a dense weight at load. One body a variant (an `overload` of the function); sizes come from attributes.

ONNX Runtime before 1.27 ignores `overload` and would run one variant's body for every node, silently wrong. So node and body of a
variant share an attribute of its name, without which the body does not resolve: such a runtime refuses the file instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ops.formats import ACTIVATION_BLOCK, TILE, Activation, AffineFormat
from qcompiler.ops.layout import UNIT_K
from qcompiler.ops.spec import DOMAIN, OpSpec

STANDARD_OPSET = 21


def marker(overload: str) -> str:
    """Name of the attribute that ties a node to the body of its variant."""
    return f"variant_{overload.replace('-', '_')}"


class Body:
    """Records the nodes of a function body; values are named so that a dump can be read."""

    def __init__(self, attributes: Sequence[str], overload: str):
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple, ir.Value] = {}
        self._attributes: dict[str, ir.Value] = {}
        self._names = 0
        self.attribute_names = [*attributes, marker(overload)]
        self.attribute(marker(overload))

    def op(self, op_type: str, *inputs: ir.Value, **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self._names += 1
        node.outputs[0].name = f"{op_type.lower()}_{self._names}"
        node.name = f"body_{self._names}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value, dtype) -> ir.Value:
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(values, np.int64)

    def attribute(self, name: str) -> ir.Value:
        """The function's integer attribute as an int64 tensor of shape [1]."""
        if name not in self._attributes:
            node = ir.Node("", "Constant", [], attributes=[ir.RefAttr("value_int", name, ir.AttributeType.INT)])
            self._names += 1
            node.outputs[0].name, node.name = f"{name}_{self._names}", f"body_{self._names}"
            self.nodes.append(node)
            self._attributes[name] = self.op("Reshape", node.outputs[0], self.ints(1))
        return self._attributes[name]

    def tile_rows(self, columns: ir.Value) -> ir.Value:
        """The shape `[tiles, 16, columns]`; the unknown is the first, so that no tiles at all is not ambiguous."""
        return self.op("Concat", self.ints(-1, TILE), columns, axis=0)

    def shift_right(self, value: ir.Value, bits: int, dtype=np.uint8) -> ir.Value:
        return self.op("BitShift", value, self.constant(bits, dtype), direction="RIGHT") if bits else value

    def field(self, value: ir.Value, shift: int, mask: int, dtype=np.uint8) -> ir.Value:
        return self.op("BitwiseAnd", self.shift_right(value, shift, dtype), self.constant(mask, dtype))

    def to_float(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.FLOAT)

    def function(self, spec: OpSpec, overload: str, inputs: Sequence[ir.Value], output: ir.Value) -> ir.Function:
        graph = ir.Graph(inputs, [output], nodes=self.nodes, opset_imports={"": STANDARD_OPSET})
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in self.attribute_names]
        return ir.Function(DOMAIN, spec.onnx_name, overload, graph=graph, attributes=attributes)


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
        shifted = [b.op("Mul", top[0], b.constant(16, np.uint8)), b.op("Mul", top[1], b.constant(4, np.uint8)), top[2]]
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
        left = [b.op("BitShift", byte[i], b.constant(8 * i, np.uint32), direction="LEFT") if i else byte[0] for i in range(3)]
        word = b.op("BitwiseOr", b.op("BitwiseOr", left[0], left[1]), left[2])
        fields = [b.field(word, 3 * i, 7, np.uint32) for i in range(8)]
        values = b.to_float(b.op("Reshape", b.op("Concat", *fields, axis=3), b.ints(0, 0, TILE)))
    return b.op("Transpose", values, perm=[0, 2, 1])


def _spread(b: Body, per_group: ir.Value, group: int) -> ir.Value:
    """`[tiles, 16, groups]` -> one value a column, `[tiles, 16, >= k]` (groups of the whole row broadcast as they are)."""
    if not group:
        return per_group
    wide = b.op("Expand", b.op("Unsqueeze", per_group, b.ints(3)), b.ints(1, 1, 1, group))
    columns = b.op("Mul", b.op("Shape", per_group, start=2, end=3), b.ints(group))
    return b.op("Slice", b.op("Reshape", wide, b.tile_rows(columns)), b.ints(0), b.attribute("k"), b.ints(2))


def decode_weight(b: Body, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, format: AffineFormat) -> ir.Value:
    """W = S · (q − Z) as float32 `[tiles, 16, k]`."""
    q = b.op("Slice", decode_codes(b, codes, format.bits), b.ints(0), b.attribute("k"), b.ints(2))
    if zeros is not None:
        q = b.op("Sub", q, _spread(b, decode_zeros(b, zeros, format.bits), format.group))
    elif format.center:
        q = b.op("Sub", q, b.constant(format.center, np.float32))
    s = b.op("Transpose", b.to_float(scales), perm=[0, 2, 1])
    return b.op("Mul", q, _spread(b, s, format.group))


def fake_quantize(b: Body, x: ir.Value, activation: Activation, k: ir.Value) -> ir.Value:
    """Activations rounded to symmetric int8 and back: scale = absmax / 127, round half to even."""
    if activation is Activation.FLOAT:
        return x
    blocks = x
    if activation is Activation.INT8_BLOCK:
        size = b.ints(ACTIVATION_BLOCK)
        short = b.op("Mod", b.op("Sub", size, b.op("Mod", k, size)), size)
        padded = b.op("Pad", x, b.op("Concat", b.ints(0), short, axis=0), b.constant(0, np.float32), b.ints(-1))
        lead = b.op("Slice", b.op("Shape", x), b.ints(0), b.ints(-1))
        # the number of blocks is written out: -1 beside a dimension of size 0 would be ambiguous
        count = b.op("Div", b.op("Add", k, short), size)
        blocks = b.op("Reshape", padded, b.op("Concat", lead, count, size, axis=0), allowzero=1)
    scale = b.op("Div", b.op("ReduceMax", b.op("Abs", blocks), b.ints(-1), keepdims=1), b.constant(127, np.float32))
    safe = b.op("Where", b.op("Equal", scale, b.constant(0, np.float32)), b.constant(1, np.float32), scale)
    q = b.op("Clip", b.op("Round", b.op("Div", blocks, safe)), b.constant(-127, np.float32), b.constant(127, np.float32))
    y = b.op("Mul", q, scale)
    if activation is Activation.INT8_BLOCK:
        flat = b.op("Reshape", y, b.op("Concat", lead, b.op("Mul", count, size), axis=0), allowzero=1)
        y = b.op("Slice", flat, b.ints(0), k, b.ints(-1))
    return y


def linear_nbit(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `LinearNBit` for one variant."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    format = AffineFormat(attributes["bits"], attributes["group"], "zeros" not in present)
    tiles = decode_weight(b, inputs["codes"], inputs["scales"], inputs["zeros"] if "zeros" in present else None, format)
    rows = b.op("Reshape", tiles, b.op("Concat", b.ints(-1), b.attribute("k"), axis=0))
    weight = b.op("Slice", rows, b.ints(0), b.attribute("n"), b.ints(0))
    x = fake_quantize(b, inputs["x"], Activation(attributes["activation"]), b.attribute("k"))
    y = b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]))
    if "bias" in present:
        y = b.op("Add", y, inputs["bias"])
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


BUILDERS = {"linear_nbit": linear_nbit, "embedding_nbit": embedding_nbit}
