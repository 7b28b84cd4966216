"""Clean-up of a fused decoder graph: what is computed again for every token and need not be.

Every rewrite keeps the result: what it removes is proven from the graph (`lengths`) to change nothing, for every number
of past and new tokens. A fused decoder layer is about ten nodes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompiler.lower.constants import constant
from qcompiler.lower.edit import MICROSOFT, is_attention, is_op, operand, producer, replace, sweep
from qcompiler.lower.length_forms import Field, Items, allows_all_causal, is_never
from qcompiler.lower.lengths import ROW_NORMS, Knowledge


def tidy(model: ir.Model) -> dict[str, int]:
    """Apply every rewrite of this file to `model`, in place; how often each applied, by name."""
    graph = model.graph
    counts = {rewrite.__name__: rewrite(graph) for rewrite in _REWRITES}
    _drop_unread_constants(graph)
    if counts["fuse_silu"]:
        model.opset_imports.setdefault(MICROSOFT, 1)
    return counts


def drop_attended_guards(graph: ir.Graph) -> int:
    """`Where(attends to nothing, 0, x)`  →  `x`, where every query attends to its own position at least."""
    known = Knowledge(graph)
    count = 0
    for node in list(graph):
        if node.op_type != "Where" or node.domain != "":
            continue
        condition = known.values.get(operand(node, 0))
        if isinstance(condition, Field) and is_never(condition.formula):
            # The choice must not have widened `x` either.
            if known.covers(operand(node, 2), condition.shape):
                count += replace(graph, node, operand(node, 2))
    return count


def drop_causal_biases(graph: ir.Graph) -> int:
    """`GroupQueryAttention(…, bias)`  →  the same without, where the bias blocks what comes after the query only.

    The kernel is causal by itself, and the bias adds zero to the rest.
    """
    known = Knowledge(graph)
    count = 0
    for node in list(graph):
        if not is_attention(node) or len(node.inputs) <= 10 or node.inputs[10] is None:
            continue
        bias, last, total = (known.values.get(operand(node, index)) for index in (10, 5, 6))
        if not (isinstance(bias, Field) and isinstance(last, Items) and isinstance(total, Items)):
            continue
        keys = bias.shape[-1]
        # The kernel reads where the queries stand from the lengths: they must be those that the bias is about.
        if total.values == (keys,) and all((value - keys).number == -1 for value in last.values):
            if allows_all_causal(bias):
                removed = operand(node, 10).producer()
                node.replace_input_with(10, None)
                if len(node.inputs) == 11:
                    node.resize_inputs(10)
                sweep(graph, removed)
                count += 1
    return count


def merge_equal_lengths(graph: ir.Graph) -> int:
    """Shape arithmetic that gives the same numbers  →  the first of them; numbers that never change  →  a constant."""
    known = Knowledge(graph)
    first: dict[tuple, ir.Value] = {}
    for value in graph.inputs:
        if isinstance(found := known.values.get(value), Items):
            first[(value.dtype, found)] = value
    count = 0
    for node in list(graph):
        if len(node.outputs) != 1 or node.graph is None:
            continue
        value = node.outputs[0]
        found = known.values.get(value)
        dtype = _whole_dtype(value)
        if not isinstance(found, Items) or dtype is None:
            continue
        earlier = first.setdefault((dtype, found), value)
        if earlier is not value:
            count += replace(graph, node, earlier)
    return count


def drop_reshapes(graph: ir.Graph) -> int:
    """`Reshape(Reshape(x))`  →  `x` where the shape is that of `x` again, else one `Reshape(x)`."""
    known = Knowledge(graph)
    count = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain != "" or node.graph is None:
            continue
        source, below = operand(node, 0), None
        while (inner := producer(source, "Reshape")) is not None:
            below, source = source, operand(inner, 0)
        shape = known.shape(node.outputs[0])
        if shape is not None and shape == known.shape(source) and replace(graph, node, source):
            count += 1
        elif below is not None and (target := constant(node.inputs[1])) is not None and 0 not in target:
            # Without a 0, which would copy an axis of its input, a reshape looks at the elements only.
            removed = operand(node, 0).producer()
            node.replace_input_with(0, source)
            sweep(graph, removed)
            count += 1
    return count


def drop_transposes(graph: ir.Graph) -> int:
    """`Transpose → norm over the last axis → Transpose back`  →  `norm`: rows are normalised alike in any order."""
    count = 0
    for node in list(graph):
        norm = producer(node.inputs[0], *ROW_NORMS) if is_op(node, "Transpose") and node.graph is not None else None
        first = producer(norm.inputs[0], "Transpose") if norm is not None else None
        if norm is None or first is None or any(output.uses() for output in norm.outputs[1:]):
            continue
        there, back = (list(n.attributes.get_ints("perm", ())) for n in (first, node))
        rank = len(there)
        if not there or len(back) != rank or [there[axis] for axis in back] != list(range(rank)):
            continue
        if norm.attributes.get_int("axis", -1) not in (-1, rank - 1) or there[-1] != rank - 1:
            continue
        if len(norm.outputs[0].uses()) != 1 or norm.outputs[0].is_graph_output():
            continue
        norm.replace_input_with(0, first.inputs[0])
        norm.outputs[0].shape = node.outputs[0].shape or operand(first, 0).shape
        count += replace(graph, node, norm.outputs[0])
        sweep(graph, first)
    return count


def fuse_silu(graph: ir.Graph) -> int:
    """`x * Sigmoid(x)`  →  `QuickGelu(x, alpha=1)`, one pass over `x`."""
    count = 0
    for node in list(graph):
        if not is_op(node, "Mul") or node.graph is None:
            continue
        for x, gate in ((operand(node, 0), operand(node, 1)), (operand(node, 1), operand(node, 0))):
            sigmoid = producer(gate, "Sigmoid")
            if sigmoid is None or sigmoid.inputs[0] is not x or len(gate.uses()) != 1 or gate.is_graph_output():
                continue
            fused = ir.node("QuickGelu", [x], attributes={"alpha": 1.0}, domain=MICROSOFT, name=node.name)
            output = node.outputs[0]
            fused.outputs[0].shape, fused.outputs[0].type = output.shape, output.type
            graph.insert_before(node, fused)
            count += replace(graph, node, fused.outputs[0])
            break
    return count


_REWRITES: tuple[Callable[[ir.Graph], int], ...] = (
    drop_attended_guards,
    drop_causal_biases,
    merge_equal_lengths,
    drop_transposes,
    drop_reshapes,
    fuse_silu,
)


def _drop_unread_constants(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _whole_dtype(value: ir.Value | None) -> ir.DataType | None:
    """Type of a value of shape arithmetic; the exporter does not declare all of them."""
    while value is not None:
        node = value.producer()
        if node is None or value.dtype is not None:
            return value.dtype
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to"))
        if node.op_type == "Shape":
            return ir.DataType.INT64
        value = node.inputs[0]
    return None
