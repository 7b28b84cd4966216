"""Let a linear op do what is done to its input before, and to its product after.

a, b = split(linear(x, [A; B]));  act(a) · b              ─▶  linear(x, [A; B], gate=act)
r + linear(x, W)                                          ─▶  linear(x, W, residual=r)
linear(x · rsqrt(mean(x²) + ε) · g, W)                    ─▶  linear(x, W, norm=g, epsilon=ε)

The arithmetic stays; what lies between the ops is neither written nor read again, and as many ops fewer are started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from qcompiler.graph import constants
from qcompiler.graph.edit import args
from qcompiler.graph.text import describe
from qcompiler.ops import linear_edges
from qcompiler.ops.formats import TILE
from qcompiler.passes.rewrite.edge_patterns import Norm, constant_value, gated, halves, multiplied, norms
from qcompiler.passes.rewrite.op_nodes import arguments, change, spec_of
from qcompiler.pipeline.passes import Pass, Report, Skip

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True)
class FuseEdges(Pass):
    """Move gates, residual sums and root-mean-square norms into the linear ops beside them, where nothing else reads the values
    between."""

    name: ClassVar[str] = "fuse_edges"
    stage: ClassVar[str] = "rewrite"

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        before = len(graph.module.graph.nodes)
        sites: dict[Node, list[str]] = {}
        for site in graph.sites:
            sites.setdefault(site.node, []).append(site.name)
        for name, rewrite in (("gates", _gates), ("residuals", _residuals), ("norms", _norms)):
            touched = []
            for found in rewrite(graph):
                if isinstance(found, Skip):
                    report.skipped.append(found)
                else:
                    touched.append(found)
            for node in touched:
                given = arguments(node)
                present = frozenset(key for key, value in given.items() if value is not None)
                words = linear_edges.words(given, present)
                report.layers |= {layer: {"edges": words} for layer in sites.get(node, ())}
            report.notes[name] = len(touched)
            report.matched += len(touched)
        report.changed = report.matched
        graph.module.graph.eliminate_dead_code()
        constants.drop_unused(graph.module)
        graph.module.recompile()
        report.notes["nodes"] = len(graph.module.graph.nodes) - before
        return report


def _linear(node: Any) -> bool:
    """Whether a value comes from an op with edges."""
    spec = spec_of(node) if isinstance(node, Node) else None
    return spec is not None and "gate" in spec.attributes


def _name(node: Node) -> str:
    """The layers that the op computes, by the name of its packed tensors."""
    return str(arguments(node)["codes"].target).rpartition(".")[0]


def _gates(graph: Graph) -> Iterator[Node | Skip]:
    """act(first half) · second half  ─▶  the op's own gate."""
    for node in filter(_linear, graph.nodes):
        parts = halves(node)
        if parts is None:
            continue
        found = gated(parts.first, parts.second)
        if found is None and multiplied(parts.first, parts.second):
            turned = gated(parts.second, parts.first) is not None
            reason = "the activation is of its second half" if turned else "its halves do not meet in act(first) · second"
            yield Skip(_name(node), reason)
        if found is None:
            continue
        gate, active, times = found
        given = arguments(node)
        if given["n"] % (2 * TILE):
            yield Skip(_name(node), f"a half of {given['n']} rows is no multiple of {TILE}")
        elif given["residual"] is not None or given["gate"]:
            yield Skip(_name(node), "its op has a gate or a residual already")
        else:
            change(node, gate=int(gate))
            _take_place(node, times)
            for dead in (active, *parts.nodes):
                node.graph.erase_node(dead)
            yield node


def _residuals(graph: Graph) -> Iterator[Node | Skip]:
    """other + product  ─▶  the op's own sum; the op moves to where the sum was."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target not in _SUMS or node.kwargs.get("alpha", 1) != 1 or len(args(node)) != 2:
            continue
        products = [value for value in args(node) if _linear(value) and arguments(value)["residual"] is None]
        products.sort(key=lambda value: position[value])
        if not products:
            continue
        free = [value for value in products if list(value.users) == [node]]
        if node.target is aten.add_.Tensor:  # what it writes into must be the product, which nobody else has
            free = [value for value in free if value is args(node)[0]]
        product = (free or products)[-1]
        other = args(node)[0] if args(node)[1] is product else args(node)[1]
        if not free or other is product:
            yield Skip(_name(product), "its product is read elsewhere than in the sum")
        elif not isinstance(other, Node) or _shape(other) != _shape(product) or _shape(node) != _shape(product):
            yield Skip(_name(product), "the sum is with a value of another shape")
        else:
            node.prepend(product)
            change(product, residual=other)
            _take_place(product, node)
            yield product


def _norms(graph: Graph) -> Iterator[Node | Skip]:
    """linear(norm(x))  ─▶  the op's own norm, where linear ops alone read the norm."""
    for found in list(norms(graph)):
        if not isinstance(found, Norm):
            node, reason = found
            if any(map(_linear, node.users)):
                yield Skip(describe(node), reason)
            continue
        readers = list(found.node.users)
        others = [user for user in readers if not _reads_as_input(user, found.node)]
        if len(others) == len(readers):
            continue  # no norm of a layer's input
        weight = constant_value(graph, found.weight)
        if others:
            by = "the output" if others[0].op == "output" else str(others[0].target)
            yield Skip(describe(found.node), f"read by {by} as well")
        elif weight is None or found.x.meta["val"].dtype is not torch.float32:
            yield Skip(describe(found.node), "its weight is computed, or its input is not float32")
        else:
            for reader in readers:
                held = _norm_weight(graph, reader, found.weight, weight)
                change(reader, x=found.x, norm=held, epsilon=found.epsilon)
                yield reader


def _reads_as_input(user: Node, value: Node) -> bool:
    """Whether a linear op without a norm reads the value as x and as nothing else."""
    if not _linear(user):
        return False
    given = arguments(user)
    return given["norm"] is None and [name for name, held in given.items() if held is value] == ["x"]


def _norm_weight(graph: Graph, reader: Node, node: Node, value: torch.Tensor) -> Node:
    """The norm's weight as a constant of its own where the graph computes it (1 + g), else as it is."""
    if node.op == "get_attr":
        return node
    name = constants.free_name(graph.module, f"{_name(reader)}.norm")
    constants.add_buffer(graph.module, name, value.contiguous())
    with reader.graph.inserting_before(reader):
        held = reader.graph.get_attr(name)
    held.meta["val"] = value
    return held


def _take_place(node: Node, of: Node) -> None:
    """Let a node give what `of` gave, which goes."""
    node.meta["val"] = of.meta["val"]
    of.replace_all_uses_with(node)
    node.graph.erase_node(of)


def _shape(node: Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
