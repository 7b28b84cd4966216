"""Follow a channel scale through a graph.

Every channel of a producer gets a number, its label. A value downstream carries labels of its own shape: an element with
label c is divided by s_c when the producer's channel c is, one with label −1 is not. What only moves elements is applied to
the labels as it is applied to the values, so a reshape that splits heads or an expand that repeats them needs no rule.
Whatever does not commute with the scale stops the labels that meet it: those channels keep s = 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph
from qcompiler.graph.text import describe
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.passes.analyse import fold_rules
from qcompiler.passes.analyse.fold_constants import ConstantView, Sharing, constant_view
from qcompiler.passes.analyse.fold_shapes import Sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Reached:
    """A product that contracts the scaled axis: its weight can take the factors.

    Attributes:
        node: the product.
        weight: name of its constant.
        labels: of its input's channels, int64 `[k]`.
        passed: what the scale went through on the way: `attention`, `product`, `relu`.
    """

    node: Node
    weight: str
    labels: torch.Tensor
    passed: frozenset[str]


@dataclass
class Surroundings:
    """What every trace over one graph shares."""

    graph: Graph
    sizes: Sizes = field(default_factory=Sizes)
    gated_attention: bool = False

    def __post_init__(self) -> None:
        self.sharing = Sharing(self.graph)
        nodes = self.graph.nodes
        self.position = {node: index for index, node in enumerate(nodes)}
        self.returned = set(nodes[-1].all_input_nodes)
        self.blocked: dict[Node, str] = {}


class Trace:
    """The labels of one producer, followed to wherever they go.

    Attributes:
        reached: products at whose input labels arrived.
        stopped: per label why it cannot be scaled, or None where nothing speaks against it.
        added: constants that are added on the way and take the scale too: (view, their elements' labels).
    """

    def __init__(self, around: Surroundings, source: Node, labels: torch.Tensor, channels: int) -> None:
        self.around = around
        self.graph, self.sizes = around.graph, around.sizes
        self.reached: list[Reached] = []
        self.stopped: list[str | None] = [None] * channels
        self.added: list[tuple[ConstantView, torch.Tensor]] = []
        self._passed: dict[Node, frozenset[str]] = {}
        self._values: dict[Node, Any] = {}
        self._caches: set[Node] = set()
        self._queue: list[int] = []
        self._waiting: set[int] = set()
        self._set(source, labels, frozenset())
        nodes = self.graph.nodes
        while self._queue:
            position = heapq.heappop(self._queue)
            self._visit(nodes[position])

    def labels(self, value: Any) -> torch.Tensor | None:
        """Labels of an argument; None where it carries none."""
        found = self._values.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, torch.Tensor) else None

    def parts(self, node: Node) -> Any:
        """Labels of each result of an op with several."""
        return self._values[node]

    def stop(self, labels: torch.Tensor, reason: str) -> None:
        """These channels cannot be scaled."""
        for label in torch.unique(labels[labels >= 0]).tolist():
            if self.stopped[label] is None:
                self.stopped[label] = reason

    def cached(self, node: Node, past: Node) -> bool:
        """Whether `node` = [past, new] is the state that the next call gets as `past`, and so carries the scale itself.

        Both steps of a decoder are this one graph, so what is in its cache was always divided by s already.
        """
        others = [user for user in past.users if user is not node and isinstance(user.meta.get("val"), torch.Tensor)]
        if self.graph.kind != "decoder" or past.op != "placeholder" or others or node not in self.around.returned:
            return False
        self._caches.add(node)
        return True

    def constant(self, value: object) -> ConstantView | None:
        return constant_view(self.graph, value, self.sizes)

    def _set(self, node: Node, value: Any, passed: frozenset[str]) -> None:
        if not any(bool((part >= 0).any()) for part in _each(value)):
            return
        self._values[node] = value
        self._passed[node] = passed
        for user in node.users:
            position = self.around.position[user]
            if position not in self._waiting:
                self._waiting.add(position)
                heapq.heappush(self._queue, position)

    def _visit(self, node: Node) -> None:
        inputs = [source for source in node.all_input_nodes if source in self._values]
        passed = frozenset().union(*(self._passed[source] for source in inputs))
        try:
            if node.op == "output":
                self._check_outputs(inputs)
                return
            if node.target in (aten.linear.default, EXPERTS_LINEAR):
                self._reach(node, passed)
                return
            value, through = fold_rules.propagate(self, node, passed)
        except fold_rules.Blocked as blocked:
            self._block(node, inputs, str(blocked))
            return
        self._set(node, value, passed | through)

    def _block(self, node: Node, inputs: list[Node], reason: str) -> None:
        self.around.blocked.setdefault(node, reason)
        for source in inputs:
            for labels in _each(self._values[source]):
                self.stop(labels, reason)

    def _check_outputs(self, inputs: list[Node]) -> None:
        for source in inputs:
            if source not in self._caches:
                for labels in _each(self._values[source]):
                    self.stop(labels, f"the value is an output of the model ({describe(source)})")

    def _reach(self, node: Node, passed: frozenset[str]) -> None:
        """The scaled axis ends here, if it is the one that is summed over and the weight can take the factors."""
        labels = self.labels(args(node)[0])
        weight: Any = args(node)[1 if node.target is aten.linear.default else 2]
        if labels is None or any(self.labels(other) is not None for other in args(node)[1:]):
            raise fold_rules.Blocked(f"{describe(node)} reads the scaled value as something else than its input")
        columns = labels.reshape(-1, labels.shape[-1])
        if bool((columns != columns[:1]).any()):
            raise fold_rules.Blocked(f"the channels of the input of {describe(node)} differ from token to token")
        if weight.op != "get_attr":
            raise fold_rules.Blocked(f"the weight of {describe(node)} is computed")
        self.reached.append(Reached(node, str(weight.target), columns[0], passed))
        problem = self.around.sharing.problem(str(weight.target))
        if problem is not None:
            raise fold_rules.Blocked(problem)


def _each(value: Any) -> Iterator[torch.Tensor]:
    yield from value if isinstance(value, (list, tuple)) else [value]
