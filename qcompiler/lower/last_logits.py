"""Logits of the last tokens only: generation needs one row of them, whatever the length of the prompt.

    before   hidden [1, new, width] ────────────────────────────────▶ head ─▶ logits [1, new, vocabulary]
    after    hidden [1, new, width] ─▶ Slice[-logits_to_keep :] ─▶ head ─▶ logits [1, kept, vocabulary]
             logits_to_keep [1] int64 ──────────▲

The head is a fifth of a small model and more, and a prompt's logits are megabytes that nobody reads. A number beyond
the tokens given keeps all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.lower.constants import constant
from qcompiler.lower.edit import operand

LOGITS_TO_KEEP = "logits_to_keep"
KEPT = "kept"

# Operators that treat every row of their first input alike, with what they take besides it constant.
_ROWWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class KeepResult:
    """Whether the graph has the input `logits_to_keep` now; if not, why."""

    changed: bool
    reason: str | None = None


def keep_last_logits(model: ir.Model, output: str = "logits") -> KeepResult:
    """Give `model` an input that says for how many of the last tokens it computes logits (int64, shape [1]).

    `output` `[1, new, vocabulary]` becomes `[1, kept, vocabulary]`. Changed is only a graph whose logits come from one
    product with a constant, through elementwise operators at most; any other is left as it is.
    """
    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == output), None)
    if logits is None:
        return KeepResult(False, f"the graph has no output {output!r}")
    if any(value.name == LOGITS_TO_KEEP for value in graph.inputs):
        return KeepResult(False, f"the graph already has an input {LOGITS_TO_KEEP!r}")
    head = _head(logits)
    if isinstance(head, str):
        return KeepResult(False, head)
    hidden = operand(head, 0)
    if hidden.shape is None or len(hidden.shape) != 3 or logits.shape is None or len(logits.shape) != 3:
        return KeepResult(False, f"the head {head.name} has rows of shape {hidden.shape}, expected [1, new, width]")
    keep = ir.Value(name=LOGITS_TO_KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(keep)
    end, along = _constant(graph, f"{LOGITS_TO_KEEP}_end", _END), _constant(graph, f"{LOGITS_TO_KEEP}_axis", 1)
    start = ir.node("Neg", [keep], name=f"{LOGITS_TO_KEEP}_start")
    kept = ir.node("Slice", [hidden, start.outputs[0], end, along], name="last_hidden")
    start.outputs[0].name, kept.outputs[0].name = f"{LOGITS_TO_KEEP}_start", "last_hidden"
    start.outputs[0].type, start.outputs[0].shape = keep.type, keep.shape
    graph.insert_before(head, [start, kept])
    _declare(kept.outputs[0], hidden, hidden.shape[2])
    head.replace_input_with(0, kept.outputs[0])
    # Between the head and the output every row is one of those kept.
    value = head.outputs[0]
    while True:
        if value.shape is not None:
            _declare(value, value, value.shape[2])
        if value is logits:
            return KeepResult(True)
        value = next(iter(value.uses())).node.outputs[0]


def _head(logits: ir.Value) -> ir.Node | str:
    """The product that the logits come from, or why there is none."""
    value = logits
    while True:
        node = value.producer()
        if node is None or len(node.outputs) != 1:
            return f"{value.name} does not come from a product with a constant"
        if value is not logits and (len(value.uses()) != 1 or value.is_graph_output()):
            return f"{value.name}, on the way to the logits, is read elsewhere too"
        others = [item for item in node.inputs[1:] if item is not None]
        if any(constant(item) is None for item in others):
            return f"{node.op_type} ({node.name}), on the way to the logits, takes more than one computed value"
        if node.domain != "" or node.op_type not in _ROWWISE:
            return node if others and _is_product(node) else f"{node.op_type} ({node.name}) is not a product of rows"
        if any(item.shape is None or len([d for d in item.shape if d != 1]) > 1 for item in others):
            return f"{node.op_type} ({node.name}), on the way to the logits, differs from row to row"
        value = operand(node, 0)


def _is_product(node: ir.Node) -> bool:
    """A linear layer in any of its forms: ONNX's, ONNX Runtime's, ours."""
    if node.op_type in ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul"):
        return True
    if node.op_type == "FusedMatMul":
        return not node.attributes.get_int("transA", 0) and not node.attributes.get_int("transBatchA", 0)
    return node.domain == "ai.qcompiler" and node.op_type.startswith("Linear")


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor(np.array([number], np.int64), name=name)
    graph.register_initializer(value)
    return value


def _declare(value: ir.Value, like: ir.Value, width: int | ir.SymbolicDim) -> None:
    value.shape, value.type = ir.Shape([1, ir.SymbolicDim(KEPT), width]), like.type
