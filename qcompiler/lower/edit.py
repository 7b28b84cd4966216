"""Small edits of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompiler.errors import GateError

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


def name_of(value: ir.Value | None) -> str:
    """The name of a value that must be there.

    Raises:
        GateError: it is left out or has no name.
    """
    if value is None or value.name is None:
        raise GateError(f"expected a value with a name, found {value!r}: the exported graph is not as the lowering expects it")
    return value.name


def stored(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of an initializer that must be there.

    Raises:
        GateError: it is left out or no constant.
    """
    if value is None or value.const_value is None:
        raise GateError(f"expected a constant, found {value!r}: the exported graph is not as the lowering expects it")
    return value.const_value


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def insert_before(node: ir.Node, nodes: Iterable[ir.Node]) -> None:
    """Put `nodes` before `node` of a graph."""
    assert node.graph is not None
    node.graph.insert_before(node, nodes)


def substitute(node: ir.Node, by: ir.Value) -> None:
    """Let `by`, a value that is made for it, take the place, name, type and shape of the one output of `node`, which goes."""
    assert node.graph is not None
    output = node.outputs[0]
    name = output.name
    output.replace_all_uses_with(by, replace_graph_outputs=True)
    by.shape, by.type = output.shape, output.type
    node.graph.remove(node, safe=True)
    by.name = name


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
