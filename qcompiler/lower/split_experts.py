"""Write products with many experts as one product an expert, for targets that have no op for all of them.

    LinearExpertsNBit(x, expert, codes, …)
        ─▶  rows_e = NonZero(expert == e);  y_e = LinearNBit(Gather(x, rows_e), codes_e, …), for each e
            Gather(Concat(y_0, y_1, …), where each row's result lies)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.lower.edit import initializer, insert_before, name_of, stored, substitute
from qcompiler.ops.spec import DOMAIN, SPECS

# Where a row belongs to no expert, the last Gather is sent out of bounds: an error and no wrong row.
_NOWHERE = 2**40


def split_experts(model: ir.Model) -> dict[str, str]:
    """Rewrite every node; `model` is changed in place.

    Returns:
        The name of the stacked codes by the name of each part's.
    """
    op_type = SPECS["linear_experts_nbit"].onnx_name
    nodes = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type == op_type]
    parts: dict[str, list[ir.Value]] = {}
    stacked = {name_of(node.inputs[2]) for node in nodes}
    for node in nodes:
        substitute(node, _split(model.graph, node, parts))
    return {name_of(part): name for name in stacked for part in parts[name]}


def _split(graph: ir.Graph, node: ir.Node, parts: dict[str, list[ir.Value]]) -> ir.Value:
    given = {i.name: v for i, v in zip(SPECS["linear_experts_nbit"].inputs, node.inputs, strict=False)}
    linear, experts = SPECS["linear_nbit"], node.attributes.get_int("experts")
    attributes = {name: node.attributes.get_int(name) for name in linear.attributes if name not in linear.defaults}
    for name in ("codes", "scales", "zeros", "bias"):
        value = given.get(name)
        if value is not None and name_of(value) not in parts:
            parts[name_of(value)] = _slices(graph, value, name, experts)
    tape = ir.tape.Tape()
    constant = lambda value: tape.op("Constant", [], {"value": ir.tensor(np.asarray(value, np.int64))})  # noqa: E731
    flat = constant([-1])
    rows, results = [], []
    for index in range(experts):
        hit = tape.op("NonZero", [tape.op("Equal", [given["expert"], constant(index)])])
        rows.append(tape.op("Reshape", [hit, flat]))
        own = {n: parts[v.name][index] for n, v in given.items() if v is not None and v.name in parts}
        own["x"] = tape.op("Gather", [given["x"], rows[-1]], {"axis": 0})
        inputs = [own.get(i.name) for i in linear.inputs]
        while inputs[-1] is None:
            inputs.pop()
        own_name, metadata = f"{node.name}_{index}", dict(node.metadata_props)
        results.append(
            tape.op(linear.onnx_name, inputs, attributes, domain=DOMAIN, name=own_name, metadata_props=metadata)
        )
    at, y = (tape.op("Concat", values, {"axis": 0}) for values in (rows, results))
    numbers = tape.op("Range", [constant(0), tape.op("Size", [at]), constant(1)])
    nowhere = tape.op("Expand", [constant(_NOWHERE), tape.op("Shape", [given["expert"]])])
    place = tape.op("ScatterElements", [nowhere, at, numbers], {"axis": 0})
    output = tape.op("Gather", [y, place], {"axis": 0})
    insert_before(node, tape.nodes)
    return output


def _slices(graph: ir.Graph, value: ir.Value, name: str, experts: int) -> list[ir.Value]:
    """An initializer for each expert's part of a stacked one, a weight's named as a layer's own: `<layer>.<expert>.codes`."""
    whole = stored(value).numpy()
    array = whole.reshape(experts, -1, *whole.shape[1:])
    array = array[:, 0] if name == "bias" else array
    base = name_of(value).removesuffix(name)
    names = [f"{value.name}.{i}" if name == "bias" else f"{base}{i}.{name}" for i in range(experts)]
    return [initializer(graph, own, part) for own, part in zip(names, array, strict=True)]
