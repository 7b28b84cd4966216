"""Lower our ops to those that an unmodified ONNX Runtime runs well on a CPU.

    ai.qcompiler::LinearNBit     ─▶  com.microsoft::MatMulNBits   (int8 activations: accuracy_level 4)
      static int8 activations    ─▶  QuantizeLinear + com.microsoft::MatMulIntegerToFloat   (8 bits, one scale a row)
    ai.qcompiler::LinearMixed    ─▶  the same of x without its outlier columns, + MatMul of those
    ai.qcompiler::LinearExpertsNBit  ─▶  one LinearNBit an expert, on the rows gathered for it (split_experts)
    ai.qcompiler::EmbeddingNBit  ─▶  Gather + unpack + scale

`MatMulNBits` wants one scale a block of a power of two: a scale of the whole row is repeated for its blocks. Its int8 activations
have one scale a block of the weight, where ours have one a token or per 128 inputs; results agree up to that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.errors import UnsupportedError
from qcompiler.lower.edit import MICROSOFT, initializer, insert_before, name_of, operand, stored, substitute
from qcompiler.lower.split_experts import split_experts
from qcompiler.lower.stock_products import StaticMatrix, edges_of, inputs_of, read_bytes, takes_static, without_outliers
from qcompiler.ops import layout
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.spec import DOMAIN
from qcompiler.recipe.schema import Recipe, Scheme, VqScheme

BITS = (8, 4, 2)  # what MatMulNBits has CPU kernels for
ROW_BLOCK = 128  # block of a row that has a single scale
INT8_ACTIVATIONS = 4  # accuracy_level


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with a format that stock ONNX Runtime has no kernel for.

    Raises:
        UnsupportedError: naming the part of the recipe, the format, and the nearest that works.
    """
    parts = {"linear": recipe.linear, "embed": recipe.embed, "head": recipe.head}
    parts |= {f"overrides.{i}": o.scheme for i, o in enumerate(recipe.overrides)}
    for name, scheme in parts.items():
        if isinstance(scheme, VqScheme):
            raise UnsupportedError(
                f"recipe {recipe.name}: {name}: stock ONNX Runtime has no kernel for {scheme.weight_format.label}; nearest: "
                "int4-g32-sym or int2-g32-asym. The target `onnx` runs it with our op library"
            )
        if not isinstance(scheme, Scheme):
            continue
        format = scheme.weight_format
        if scheme.activation is Activation.INT8_STATIC and name != "embed" and not takes_static(format):
            row = replace(format, bits=8, group=0).label
            raise UnsupportedError(
                f"recipe {recipe.name}: {name}: stock ONNX Runtime has no kernel for {format.label} with int8-static "
                f"activations; nearest: {row} with int8-static, or {format.label} with int8-block128. "
                "The target `onnx` runs it with our op library"
            )
        if scheme.bits not in BITS:
            near = [replace(format, bits=bits).label for bits in (format.bits + 1, format.bits - 1)]
            raise UnsupportedError(
                f"recipe {recipe.name}: {name}: stock ONNX Runtime has no kernel for {format.label}; "
                f"nearest: {' or '.join(near)}. The target `onnx` runs it with our op library"
            )


@dataclass
class StockWeight:
    """A weight `[n, k]` in the layout of MatMulNBits.

    Attributes:
        codes, scales, zeros: initializers; no zeros where the format is symmetric.
        points: zero points as an embedding looks them up, one byte each; made when the first one does.
        matrix: the weight once more, as a product with static activations reads it; made when the first one does.
        beside: bytes of what sites have beside the weight, by kind.
    """

    n: int
    k: int
    bits: int
    block: int
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    points: ir.Value | None = None
    matrix: StaticMatrix | None = None
    beside: dict[str, int] = field(default_factory=dict)

    def bytes(self) -> dict[str, int]:
        """Size of the tensors that some node reads, by what they are."""
        stored, matrix = read_bytes(self.codes), {} if self.matrix is None else self.matrix.bytes()
        codes = -(-self.n * self.k * self.bits // 8) if stored else 0
        return {
            "codes": codes + matrix.get("codes", 0),
            "scales": read_bytes(self.scales) + matrix.get("scales", 0),
            "zeros": read_bytes(self.zeros) + read_bytes(self.points) + matrix.get("zeros", 0),
            "padding": stored - codes,
            **self.beside,
        }


def planned_bytes(n: int, k: int, format: AffineFormat) -> dict[str, int]:
    """Bytes of a weight `[n, k]` in stock layout, by what they are; as `StockWeight.bytes` of a linear layer."""
    block = format.group or ROW_BLOCK
    blocks = -(-k // block)
    codes = -(-n * k * format.bits // 8)
    return {
        "codes": codes,
        "scales": 4 * n * blocks,
        "zeros": 0 if format.symmetric else n * -(-blocks * format.bits // 8),
        "padding": n * blocks * block * format.bits // 8 - codes,
    }


def to_stock(model: ir.Model) -> dict[str, dict[str, int]]:
    """Rewrite every node of our domain; `model` is changed in place.

    Returns:
        Bytes by `codes`, `scales`, `zeros`, `padding` for each weight, by the name of its packed codes.
    """
    whole = split_experts(model)
    weights: dict[str, StockWeight] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN:
            continue
        if node.op_type not in _LOWER:
            raise UnsupportedError(f"node {node.name}: the target `onnx-stock` has nothing in place of {node.op_type}")
        if given := edges_of(node):
            raise UnsupportedError(
                f"node {node.name}: the target `onnx-stock` has nothing in place of {node.op_type} with {', '.join(given)}; "
                "compile without fusing what stands before and after the products"
            )
        codes = name_of(node.inputs[1])
        if codes not in weights:
            weights[codes] = _convert(model.graph, node)
        substitute(node, _LOWER[node.op_type](model.graph, node, weights[codes]))
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.graph.opset_imports.pop(DOMAIN, None)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    initializers = model.graph.initializers
    for unread in [name for name, v in initializers.items() if not v.uses() and not v.is_graph_output()]:
        del initializers[unread]
    totals: dict[str, dict[str, int]] = {}
    for name, weight in weights.items():
        total = totals.setdefault(whole.get(name, name), {})
        for kind, size in weight.bytes().items():
            total[kind] = total.get(kind, 0) + size
    return totals


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes `[..., count]` -> bytes, the first code in the lowest bits."""
    per_byte = 8 // bits
    count = codes.shape[-1]
    padded = np.zeros((*codes.shape[:-1], -(-count // per_byte) * per_byte), np.uint8)
    padded[..., :count] = codes
    fields = padded.reshape(*codes.shape[:-1], -1, per_byte) << (np.arange(per_byte, dtype=np.uint8) * bits)
    return np.bitwise_or.reduce(fields, axis=-1)


def _convert(graph: ir.Graph, node: ir.Node) -> StockWeight:
    attribute = node.attributes.get_int
    n, k, bits, group = (attribute(name) for name in ("n", "k", "bits", "group"))
    packed_zeros = node.inputs[3] if len(node.inputs) > 3 else None
    format = AffineFormat(bits, group, packed_zeros is None)
    if bits not in BITS:
        raise UnsupportedError(f"node {node.name}: stock ONNX Runtime has no kernel for {format.label}")
    block = group or ROW_BLOCK
    blocks = -(-k // block)
    shift = 128 if bits == 8 else 0  # MatMulNBits has unsigned codes; ours of 8 bits are signed
    codes = layout.unpack_codes(stored(node.inputs[1]).numpy(), n, k, bits).astype(np.int16) + shift
    padded = np.full((n, blocks * block), format.center + shift, np.uint8)
    padded[:, :k] = codes
    scales = layout.unpack_scales(stored(node.inputs[2]).numpy(), n).astype(np.float32)
    scales = np.ascontiguousarray(np.broadcast_to(scales, (n, blocks)))
    base = name_of(node.inputs[1]).removesuffix("codes")
    array = _pack(padded.reshape(n, blocks, block), bits)
    zeros = None
    if packed_zeros is not None:
        points = layout.unpack_zeros(stored(packed_zeros).numpy(), n, bits).astype(np.int16) + shift
        packed = _pack(np.broadcast_to(points, (n, blocks)).astype(np.uint8), bits)
        zeros = initializer(graph, f"{base}zero_points", packed)
    blocked, scaled = initializer(graph, f"{base}blocks", array), initializer(graph, f"{base}block_scales", scales)
    return StockWeight(n, k, bits, block, blocked, scaled, zeros)


def _linear(graph: ir.Graph, node: ir.Node, weight: StockWeight) -> ir.Value:
    return _product(graph, node, weight, inputs_of(node), operand(node, 0))


def _mixed(graph: ir.Graph, node: ir.Node, weight: StockWeight) -> ir.Value:
    given = inputs_of(node)
    rest, add = without_outliers(graph, node, given, weight.beside)
    return add(_product(graph, node, weight, given, rest))


def _product(
    graph: ir.Graph, node: ir.Node, weight: StockWeight, given: dict[str, ir.Value | None], x: ir.Value
) -> ir.Value:
    attribute = node.attributes.get_int
    if Activation(attribute("activation")) is Activation.INT8_STATIC:
        if weight.matrix is None:
            weight.matrix = StaticMatrix.of(graph, node, given)
        return weight.matrix.product(graph, node, given, x, weight.beside)
    attributes = {"K": attribute("k"), "N": attribute("n"), "bits": weight.bits, "block_size": weight.block}
    if Activation(attribute("activation")) is not Activation.FLOAT:
        attributes["accuracy_level"] = INT8_ACTIVATIONS
    inputs = [x, weight.codes, weight.scales]
    if weight.zeros is not None:
        inputs.append(weight.zeros)
    new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT, name=node.name)
    new.metadata_props.update(node.metadata_props)
    nodes, output = [new], new.outputs[0]
    if given["bias"] is not None:
        add = ir.node("Add", [output, given["bias"]])
        nodes, output = [new, add], add.outputs[0]
    insert_before(node, nodes)
    return output


def _embedding(graph: ir.Graph, node: ir.Node, weight: StockWeight) -> ir.Value:
    """Rows gathered in packed form, unpacked, scaled: `[..., blocks, bytes]` -> `[..., k]`."""
    n, k = (node.attributes.get_int(name) for name in ("n", "k"))
    ids = operand(node, 0)
    tape = ir.tape.Tape()
    constant = lambda value, dtype: tape.op("Constant", [], {"value": ir.tensor(np.asarray(value, dtype))})  # noqa: E731
    assert ids.shape is not None
    rank, blocks = len(ids.shape), -(-k // weight.block)
    rows = tape.op("Gather", [weight.codes, ids], {"axis": 0})
    if weight.bits < 8:
        mask = constant(2**weight.bits - 1, np.uint8)
        fields = []
        for shift in range(0, 8, weight.bits):
            moved = tape.op("BitShift", [rows, constant(shift, np.uint8)], {"direction": "RIGHT"}) if shift else rows
            fields.append(tape.op("Unsqueeze", [tape.op("BitwiseAnd", [moved, mask]), constant([rank + 2], np.int64)]))
        rows = tape.op("Concat", fields, {"axis": rank + 2})
        rows = tape.op("Reshape", [rows, constant([0] * (rank + 1) + [weight.block], np.int64)])
    q = tape.op("Cast", [rows], {"to": ir.DataType.FLOAT})
    if weight.zeros is None:
        q = tape.op("Sub", [q, constant(128 if weight.bits == 8 else 2 ** (weight.bits - 1), np.float32)])
    else:
        if weight.points is None:
            points = layout.unpack_zeros(stored(node.inputs[3]).numpy(), n, weight.bits).astype(np.int16)
            wide = np.broadcast_to(points + (128 if weight.bits == 8 else 0), (n, blocks))
            weight.points = initializer(
                graph, f"{weight.codes.name}_points", np.ascontiguousarray(wide.astype(np.uint8))
            )
        z = tape.op("Cast", [tape.op("Gather", [weight.points, ids], {"axis": 0})], {"to": ir.DataType.FLOAT})
        q = tape.op("Sub", [q, tape.op("Unsqueeze", [z, constant([rank + 1], np.int64)])])
    s = tape.op("Gather", [weight.scales, ids], {"axis": 0})
    w = tape.op("Mul", [q, tape.op("Unsqueeze", [s, constant([rank + 1], np.int64)])])
    flat = tape.op("Reshape", [w, constant([0] * rank + [blocks * weight.block], np.int64)])
    y = tape.op("Slice", [flat, constant([0], np.int64), constant([k], np.int64), constant([rank], np.int64)])
    insert_before(node, tape.nodes)
    return y


_LOWER = {"LinearNBit": _linear, "LinearMixed": _mixed, "EmbeddingNBit": _embedding}
