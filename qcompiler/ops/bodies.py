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

from qcompiler.ops import body_edges
from qcompiler.ops.activation_range import INPUTS
from qcompiler.ops.body_arithmetic import StaticRange, add_outliers, float_product, integer_product, without_columns
from qcompiler.ops.body_builder import Body
from qcompiler.ops.body_decode import decode_levels, decode_scales, decode_weight, pick_rows, rows, wanted_tiles
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.spec import OpSpec
from qcompiler.ops.vq_bodies import embedding_vq, linear_vq


def linear_nbit(spec: OpSpec, overload: str, attributes: dict[str, int], present: frozenset[str]) -> ir.Function:
    """The body of `LinearNBit` for one variant."""
    b = Body(spec.attributes, overload)
    inputs = {i.name: ir.Value(name=i.name) for i in spec.inputs}
    x, codes, scales = body_edges.normalized(b, inputs, present), inputs["codes"], inputs["scales"]
    zeros = inputs["zeros"] if "zeros" in present else None
    y = _product(b, x, codes, scales, zeros, attributes, _static_range(inputs, present))
    if "bias" in present:
        y = b.op("Add", y, inputs["bias"])
    y = body_edges.finished(b, y, inputs, attributes, present)
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
        return float_product(b, x, rows(b, decode_weight(b, codes, scales, zeros, format), b.attribute("k")))
    levels = rows(b, decode_levels(b, codes, zeros, format), b.attribute("k"))
    factors = decode_scales(b, scales)
    return integer_product(b, x, levels, rows(b, factors, b.dimension(factors, 2)), format, activation, static)


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
    row, tile = wanted_tiles(b, inputs["indices"])
    gathered = [b.op("Gather", inputs[name], tile, axis=0) for name in ("codes", "scales")]
    zeros = b.op("Gather", inputs["zeros"], tile, axis=0) if "zeros" in present else None
    y = pick_rows(b, decode_weight(b, gathered[0], gathered[1], zeros, format), row, inputs["indices"])
    return b.function(spec, overload, list(inputs.values()), y)


BUILDERS = {
    "linear_nbit": linear_nbit,
    "linear_mixed": linear_mixed,
    "linear_experts_nbit": linear_experts_nbit,
    "embedding_nbit": embedding_nbit,
    "linear_vq": linear_vq,
    "embedding_vq": embedding_vq,
}
