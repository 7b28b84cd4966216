"""Runs a stretch of a graph on one sample, holding no value longer than it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from qcompiler.graph.graph import Graph
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.sweep.order import ancestors
from qcompiler.sweep.place import CPU

Product = Callable[..., torch.Tensor]

# Which argument of a site's op is its weight; a lookup's is the first.
_WEIGHT_AT: dict[object, int] = {torch.ops.aten.linear.default: 1, EXPERTS_LINEAR: 2}


class Executor:
    """One run of the nodes that some wanted values need.

    Args:
        graph: constants are read through it.
        nodes: candidates, in execution order; what the wanted values do not need is not run.
        wanted: nodes whose values are asked for.
        products: instead of a site's own op, what to call with its arguments.
        cache_bytes: widened or scaled weights are kept from sample to sample up to this many bytes.
        gradients: keep what a backward pass needs.
        constants: by name, instead of the graph's own.
        device: where the values are; constants are moved there as they are read, and nodes that name a device make theirs there.
    """

    def __init__(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        wanted: Sequence[Node],
        products: Mapping[Node, Product],
        cache_bytes: int = 0,
        gradients: bool = False,
        constants: Mapping[str, torch.Tensor] | None = None,
        device: str = CPU,
    ):
        needed = ancestors(wanted)
        self._graph = graph
        self._products = products
        self._wanted = set(wanted)
        self.nodes = [node for node in nodes if node in needed]
        self._last_use: dict[Node, int] = {}
        for position, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                self._last_use[source] = position
        self._dying: dict[int, list[Node]] = {}
        for node, position in self._last_use.items():
            if node not in self._wanted:
                self._dying.setdefault(position, []).append(node)
        self._constants: dict[Node, torch.Tensor] = {}
        self._room = cache_bytes
        self._gradients = gradients
        self._given = constants or {}
        self._device = device

    def run(self, values: Mapping[Node, Any], seen: Callable[[Node, Any], None] | None = None) -> dict[Node, Any]:
        """Run on one sample.

        Args:
            values: inputs of the graph and values of earlier stretches, by node.
            seen: called with every wanted node of this stretch and its value, as soon as it is there.

        Returns:
            The wanted values.
        """
        env: dict[Node, Any] = dict(values)
        with torch.set_grad_enabled(self._gradients):
            for position, node in enumerate(self.nodes):
                env[node] = self._compute(node, env)
                if seen is not None and node in self._wanted:
                    seen(node, env[node])
                for dead in self._dying.get(position, ()):
                    env.pop(dead, None)
        return {node: env[node] for node in self._wanted if node in env}

    def _compute(self, node: Node, env: dict[Node, Any]) -> Any:
        product = self._products.get(node)

        def fetch(source: Node) -> Any:
            return self._constant(source) if source.op == "get_attr" else env[source]

        if product is not None:
            # The product brings its own weight: the float one is not read.
            position = _WEIGHT_AT.get(node.target, 0)
            given = [None if index == position else map_arg(a, fetch) for index, a in enumerate(node.args)]
            return product(*given)
        args, kwargs = map_arg(node.args, fetch), map_arg(node.kwargs, fetch)
        if self._device != CPU:
            args, kwargs = map_aggregate((args, kwargs), self._there)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _there(self, value: Any) -> Any:
        return torch.device(self._device) if isinstance(value, torch.device) else value

    def _constant(self, node: Node) -> torch.Tensor:
        held = self._constants.get(node)
        if held is not None:
            return held
        name = str(node.target)
        if name in self._given:
            return self._given[name]
        if name not in self._graph.scalings and all(user.target is EXPERTS_LINEAR for user in node.users):
            return self._graph.stored(name).to(self._device)  # widened matrix by matrix
        value = self._graph.constant(name).to(self._device)
        computed = node.meta.get("val")
        if isinstance(computed, torch.Tensor) and value.dtype != computed.dtype:
            value = value.to(computed.dtype)
        stored = self._graph.stored(name)
        size = 0 if value.data_ptr() == stored.data_ptr() else value.numel() * value.element_size()
        if size <= self._room:
            self._constants[node] = value
            self._room -= size
        return value
