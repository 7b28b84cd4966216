"""Cosines and sines in double precision, rounded to float32 once.

    Cos(x)  →  Cast(Cos(Cast(x, double)), float)

A table of rotary angles is a few numbers a token. In float32 every runtime gives them its own last bit, which a model with int8
activations answers with steps of 1/127; in double precision rounded once all give the same.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.lower.edit import insert_before, is_op


def widen_angles(model: ir.Model) -> int:
    """Change every Cos and Sin of float32 in `model`, in place; returns how many."""
    count = 0
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if not (is_op(node, "Cos") or is_op(node, "Sin")) or node.inputs[0] is None:
            continue
        output = node.outputs[0]
        if (output.dtype or node.inputs[0].dtype) != ir.DataType.FLOAT:
            continue
        x, name, double = node.inputs[0], output.name, ir.TensorType(ir.DataType.DOUBLE)
        if x not in widened:  # a cosine and a sine of one angle
            wide = ir.node("Cast", [x], {"to": ir.DataType.DOUBLE}, name=f"{node.name}_wide")
            wide.outputs[0].name, wide.outputs[0].type, wide.outputs[0].shape = f"{x.name}_wide", double, x.shape
            insert_before(node, [wide])
            widened[x] = wide.outputs[0]
        angle = ir.node(node.op_type, [widened[x]], name=node.name, metadata_props=dict(node.metadata_props))
        angle.outputs[0].name, angle.outputs[0].type, angle.outputs[0].shape = f"{name}_double", double, output.shape
        narrow = ir.node("Cast", [angle.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}_narrow")
        new = narrow.outputs[0]
        insert_before(node, [angle, narrow])
        output.replace_all_uses_with(new, replace_graph_outputs=True)
        new.shape, new.type = output.shape, output.type
        output.name, new.name = None, name
        model.graph.remove(node, safe=True)
        count += 1
    return count
