"""Compute weights that follow from constants alone: normalised, scaled or merged ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from qcompiler.graph.constants import constant_of, free_name, set_parameter
from qcompiler.graph.edit import args, get_constant
from qcompiler.graph.graph import Graph
from qcompiler.pipeline.passes import Pass, Report

aten = torch.ops.aten

# Which argument of a product or lookup is its weight.
_WEIGHT = {
    aten.addmm.default: 2, aten.bmm.default: 1, aten.embedding.default: 0, aten.linear.default: 1, aten.matmul.default: 1,
    aten.mm.default: 1,
}  # fmt: skip


@dataclass(frozen=True)
class EvaluateWeights(Pass):
    """Put a constant in the place of a weight that is computed of constants.

    linear(x, add(W, matmul(B, A)))    ─▶  linear(x, V)
    linear(x, weight_norm(v, g))       ─▶  linear(x, V)
    """

    name: ClassVar[str] = "evaluate_weights"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        report = Report()
        constant = _constant_nodes(graph)
        made: dict[str, str] = {}
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target not in _WEIGHT or node in constant:
                continue
            weight = args(node)[_WEIGHT[node.target]]
            # What is only relabelled is read as it is stored.
            if weight not in constant or constant_of(weight) is not None or not weight.meta["val"].is_floating_point():
                continue
            report.matched += 1
            key = _formula(weight)
            if key not in made:
                made[key] = free_name(module, _name(graph, node, weight))
                set_parameter(module, made[key], _value(graph, weight, {}).detach().contiguous())
            with module.graph.inserting_before(node):
                node.replace_input_with(weight, get_constant(module, made[key], like=node))
            report.changed += 1
        module.graph.eliminate_dead_code()
        module.recompile()
        return report


def _constant_nodes(graph: Graph) -> set[Node]:
    """Nodes that have the same value in every call."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function" and node.all_input_nodes and all(source in found for source in node.all_input_nodes):
            pure = node.target is operator.getitem or (
                isinstance(node.target, torch._ops.OpOverload)
                and not node.target._schema.is_mutable
                and torch.Tag.nondeterministic_seeded not in node.target.tags
            )
            if pure and not _written(node):
                found.add(node)
    return found


def _written(node: Node) -> bool:
    """Whether something writes into the value."""
    return any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in node.users)


def _value(graph: Graph, node: Node, known: dict[Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = graph.constant(str(node.target))
        else:
            given, keywords = map_arg((node.args, node.kwargs), lambda source: _value(graph, source, known))
            with torch.no_grad():
                known[node] = cast(Callable[..., Any], node.target)(*given, **keywords)
    return known[node]


def _formula(node: Node) -> str:
    """Equal for nodes that compute the same of the same constants: a module that is called twice computes its weight twice."""
    if node.op == "get_attr":
        return str(node.target)
    given: Any = map_arg((node.args, node.kwargs), lambda source: cast(Any, _Text(_formula(source))))
    return f"{node.target}{given}"


class _Text(str):
    """A formula within another."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _name(graph: Graph, node: Node, weight: Node) -> str:
    """Where the user would look for it: in the module that computes the product; without one beside its largest part."""
    stack = node.meta.get("nn_module_stack") or {}
    caller = next(reversed(list(stack.values())), ("", ""))[0]
    return f"{caller}.weight" if caller else f"{max(_parts(weight), key=lambda name: graph.stored(name).numel())}_computed"


def _parts(node: Node) -> list[str]:
    """Names of the constants that a node is computed of."""
    return [str(node.target)] if node.op == "get_attr" else [name for source in node.all_input_nodes for name in _parts(source)]
