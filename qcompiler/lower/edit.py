"""Small edits of an ONNX graph."""

from __future__ import annotations

import onnx_ir as ir

MICROSOFT = "com.microsoft"


def is_op(node: ir.Node, op_type: str) -> bool:
    """Whether it is that operator of ONNX itself."""
    return node.op_type == op_type and node.domain == ""


def is_attention(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    assert value is not None
    return value


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The ONNX operator of one of these types that gives `value`, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types and node.domain == "" else None


def replace(graph: ir.Graph, node: ir.Node, by: ir.Value) -> bool:
    """Let `by` stand for the one output of `node`, then remove what nobody reads any more.

    False, with nothing changed, where that would have to give one value two names of the graph's interface.
    """
    output = node.outputs[0]
    if output.is_graph_output():
        if by.is_graph_output() or by.is_graph_input() or by.is_initializer():
            return False
        name, by.name = output.name, None
        output.name, by.name = f"{name}_before", name
    if by.shape is None and output.shape is not None:
        by.shape = output.shape
    if by.type is None and output.type is not None:
        by.type = output.type
    output.replace_all_uses_with(by, replace_graph_outputs=True)
    sweep(graph, node)
    return True


def sweep(graph: ir.Graph, node: ir.Node | None) -> None:
    """Remove `node` and then what only it read, as long as nothing uses them."""
    if node is None or node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
        return
    feeders = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for feeder in feeders:
        sweep(graph, feeder)
