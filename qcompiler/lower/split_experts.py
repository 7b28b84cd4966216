"""Write products with many experts as one product an expert, for targets that have no op for all of them.

    LinearExpertsNBit(x, expert, codes, …)
        ─▶  rows_e = NonZero(expert == e);  y_e = LinearNBit(Gather(x, rows_e), codes_e, …), for each e
            Gather(Concat(y_0, y_1, …), where each row's result lies)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

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
    stacked = {node.inputs[2].name for node in nodes}
    for node in nodes:
        output = _split(model.graph, node, parts)
        name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        node.graph.remove(node, safe=True)
        output.name = name
    return {part.name: name for name in stacked for part in parts[name]}


def _split(graph: ir.Graph, node: ir.Node, parts: dict[str, list[ir.Value]]) -> ir.Value:
    given = {i.name: v for i, v in zip(SPECS["linear_experts_nbit"].inputs, node.inputs, strict=False)}
    linear, experts = SPECS["linear_nbit"], node.attributes.get_int("experts")
    attributes = {name: node.attributes.get_int(name) for name in linear.attributes}
    for name in ("codes", "scales", "zeros", "bias"):
        value = given.get(name)
        if value is not None and value.name not in parts:
            parts[value.name] = _slices(graph, value, name, experts)
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
        results.append(tape.op(linear.onnx_name, inputs, attributes, domain=DOMAIN))
        results[-1].producer().name = f"{node.name}_{index}"
        results[-1].producer().metadata_props.update(node.metadata_props)
    at, y = (tape.op("Concat", values, {"axis": 0}) for values in (rows, results))
    numbers = tape.op("Range", [constant(0), tape.op("Size", [at]), constant(1)])
    nowhere = tape.op("Expand", [constant(_NOWHERE), tape.op("Shape", [given["expert"]])])
    place = tape.op("ScatterElements", [nowhere, at, numbers], {"axis": 0})
    output = tape.op("Gather", [y, place], {"axis": 0})
    node.graph.insert_before(node, tape.nodes)
    return output


def _slices(graph: ir.Graph, value: ir.Value, name: str, experts: int) -> list[ir.Value]:
    """An initializer for each expert's part of a stacked one, a weight's named as a layer's own: `<layer>.<expert>.codes`."""
    array = value.const_value.numpy().reshape(experts, -1, *value.const_value.shape[1:])
    array = array[:, 0] if name == "bias" else array
    base = value.name.removesuffix(name)
    made = []
    for index in range(experts):
        own = f"{value.name}.{index}" if name == "bias" else f"{base}{index}.{name}"
        part = ir.Value(name=own, const_value=ir.tensor(array[index], name=own))
        part.dtype, part.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array[index].shape)
        graph.register_initializer(part)
        made.append(part)
    return made
