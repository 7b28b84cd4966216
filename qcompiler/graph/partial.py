"""Run a captured graph up to any point, and from there more than once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree

from qcompiler.graph.constants import attribute
from qcompiler.graph.graph import Graph
from qcompiler.sweep.place import CPU, moved


class PartialRun:
    """What a graph's first output needs (a decoder's logits; its cache is left out), to be run from and to any point.

    An environment maps nodes to values: those that are alive at that point, constants left out.

    Args:
        graph: captured.
        device: where it runs: environments are there, constants are moved as they are read.

    Attributes:
        nodes: the calls, in order.
        position: where in `nodes` each of them is.
        output: the node of the first output.
    """

    def __init__(self, graph: Graph, device: str = CPU) -> None:
        self.graph, self.device = graph, device
        everything = graph.nodes
        self.output = next(leaf for leaf in _pytree.tree_leaves(everything[-1].args) if isinstance(leaf, Node))
        writers = [n for n in everything if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
        # What writes into a value is needed though nobody may read what it returns.
        needed: set[Node] = set()
        todo = [self.output, *writers]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += node.all_input_nodes
        self.nodes = [n for n in everything if n in needed and n.op not in ("placeholder", "get_attr")]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        last = {value: i for i, node in enumerate(self.nodes) for value in node.all_input_nodes}
        self.ends: dict[int, list[Node]] = {}
        for value, i in last.items():
            if value is not self.output:
                self.ends.setdefault(i, []).append(value)
        self.placeholders = [n for n in everything if n.op == "placeholder"]
        self._writes = bool(writers)

    def begin(self, inputs: dict[str, Any]) -> dict[Node, Any]:
        """The environment before the first node; `inputs` are the graph's keyword arguments."""
        return dict(zip(self.placeholders, moved(_pytree.tree_leaves(inputs), self.device), strict=True))

    def run(
        self, env: dict[Node, Any], start: int, stop: int | None, replaced: Mapping[int, torch.Tensor] | None = None
    ) -> None:
        """Run nodes `start` up to `stop` (None: to the end) in `env`, and drop what is not read any more.

        `replaced`: other values for arguments of the first of them, by position.
        """
        for i in range(start, len(self.nodes) if stop is None else stop):
            node = self.nodes[i]
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(n, env))
            if self.device != CPU:
                args, kwargs = map_aggregate((args, kwargs), self._there)
            if replaced and i == start:
                args = tuple(replaced.get(position, value) for position, value in enumerate(args))
            assert callable(node.target)
            env[node] = node.target(*args, **kwargs)
            for value in self.ends.get(i, ()):
                env.pop(value, None)

    def branch(self, env: dict[Node, Any]) -> dict[Node, Any]:
        """A copy of `env` to go on from; tensors are shared unless nodes of this graph write into their arguments."""
        return copy.deepcopy(env, {id(node): node for node in env}) if self._writes else dict(env)

    def _value(self, node: Node, env: dict[Node, Any]) -> Any:
        if node.op != "get_attr":
            return env[node]
        held = attribute(self.graph.module, str(node.target))
        return self.graph.constant(str(node.target)).to(self.device) if isinstance(held, torch.Tensor) else held

    def _there(self, value: Any) -> Any:
        return torch.device(self.device) if isinstance(value, torch.device) else value
