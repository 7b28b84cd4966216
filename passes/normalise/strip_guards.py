"""Remove what checks and what does nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph
from qcompiler.pipeline.passes import Pass, Report

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)
_COMPARISONS = frozenset({operator.eq, operator.ge, operator.gt, operator.le, operator.lt, operator.ne})
_ALIASES = frozenset({aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh.default})
_CASTS = frozenset({aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default})
_DROPOUTS = frozenset(
    {aten.alpha_dropout.default, aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default}
)
_TO_THE_END = 2**63 - 1


@dataclass(frozen=True)
class StripGuards(Pass):
    """Remove guards, assertions, and ops that hand their input on.

    _guards_fn(ids, …)                        ─▶  (gone)
    _assert_tensor_metadata(x, …)             ─▶  (gone)
    alias(x) | detach(x) | dropout(x, p, False) | to(x, x.dtype) | slice(x, d, 0, end)   ─▶  x
    """

    name: ClassVar[str] = "strip_guards"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        guards = assertions = handed_on = 0
        for node in reversed(list(module.graph.nodes)):
            if node.op == "call_module" and node.target == "_guards_fn":
                module.graph.erase_node(node)
                guards += 1
            elif node.op == "call_function" and (node.target in _ASSERTIONS or _dead_comparison(node)):
                module.graph.erase_node(node)
                assertions += 1
            elif node.op == "call_function" and _hands_on(node):
                node.replace_all_uses_with(args(node)[0])
                module.graph.erase_node(node)
                handed_on += 1
        if hasattr(module, "_guards_fn"):
            del module._guards_fn
        before = len(module.graph.nodes)
        module.graph.eliminate_dead_code()
        dead = before - len(module.graph.nodes)
        module.recompile()
        total = guards + assertions + handed_on + dead
        notes = {"guards": guards, "assertions": assertions, "handed_on": handed_on, "dead": dead}
        return Report(matched=total, changed=total, notes=notes)


def _dead_comparison(node: Node) -> bool:
    # Left behind by guards; fx takes Python callables for impure and keeps them.
    return node.target in _COMPARISONS and not node.users


def _hands_on(node: Node) -> bool:
    """Whether the node's output is its first input, bit for bit, in the same layout."""
    if not args(node) or not isinstance(args(node)[0], Node):
        return False
    if node.target in _ALIASES:
        return True
    if node.target in _DROPOUTS:
        return args(node)[2] is False
    if node.target in _CASTS:
        before, after = args(node)[0].meta.get("val"), node.meta.get("val")
        return (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
            and not _copies(node)
        )
    if node.target is aten.slice.Tensor:
        start, end, step = [*args(node)[2:], None, None, None][:3]
        return (start is None or start == 0) and (end is None or end == _TO_THE_END) and step in (None, 1)
    return False


def _copies(node: Node) -> bool:
    # `to(x, dtype, non_blocking, copy)`: a copy is no alias, and its memory format may differ.
    return bool(node.kwargs.get("copy")) or node.kwargs.get("memory_format") is not None or True in args(node)[2:]
