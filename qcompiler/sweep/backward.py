"""Gradients through the whole float model, one segment at a time.

    forward   h₀ ─▶ h₁ ─▶ … ─▶ h_L      the values at the cuts are kept, beyond a budget in files
    backward  each segment runs once more from h_i, now recording: ∂l/∂h_{i+1} ─▶ ∂l/∂(values inside), ∂l/∂h_i

The weights stay in their files; only one segment's recorded values of one sample are alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils import _pytree

from qcompiler.errors import InputError, UsageError
from qcompiler.graph.graph import Graph, Site
from qcompiler.sweep.backward_plan import plan_backward
from qcompiler.sweep.execute import Executor
from qcompiler.sweep.order import Order, Stretch, order
from qcompiler.sweep.place import moved
from qcompiler.sweep.sizes import bindings, node_bytes, size_of
from qcompiler.sweep.values import Values

if TYPE_CHECKING:
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep.losses import Loss

# Called with a site, the number of the sample, and ∂l/∂z of all of z's shape.
Tap = Callable[[Site, int, torch.Tensor], None]


class Backward:
    """One backward pass of the float model: solutions and static ranges of the context have no part in it.

        for sites in Backward(graph, context, sites, loss).run(tap): …

    Args:
        graph: after analysis.
        context: its samples and its budget.
        sites: whose outputs' gradients are wanted.
        loss: of a sample.
        kept: bytes that the caller keeps of a site while its segment is worked on, from the rows of z in all samples.
        scale: of the loss while its gradients flow.

    Raises:
        UsageError: there are no samples.
        CapacityError: no way of cutting the graph keeps the budget.
    """

    def __init__(
        self,
        graph: Graph,
        context: Context,
        sites: Sequence[Site],
        loss: Loss,
        kept: Callable[[int], int] = lambda _: 0,
        scale: float = 1.0,
    ):
        self.graph, self.context, self.ends = graph, context, loss.ends.nodes
        self._loss, self._scale = loss, scale
        self._placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
        self.samples: list[dict[str, Any]] = list(context.samples())
        if not self.samples:
            raise UsageError("gradients need calibration samples, and there are none; give text (--text) or samples")
        self._leaves = [_pytree.tree_leaves(sample) for sample in self.samples]
        for index, leaves in enumerate(self._leaves):
            if len(leaves) != len(self._placeholders):
                raise UsageError(f"sample {index} has {len(leaves)} values, the graph takes {len(self._placeholders)}")
        largest = max(self._leaves, key=lambda leaves: sum(x.numel() for x in leaves if isinstance(x, torch.Tensor)))
        self.bound = bindings(self._placeholders, largest)
        self.order: Order = order(graph, sites, lambda node: node_bytes(node, self.bound), self.ends)
        self._rows: dict[tuple[str, int], int] = {}
        self._plan = plan_backward(self, lambda site: kept(self._most_rows(site)))
        self.stretches: list[Stretch] = self.order.stretches(self._plan.cuts)
        self._moved = _downstream([site.node for site in sites], self.order.nodes)

    def run(self, tap: Tap) -> Iterator[list[Site]]:
        """Go forward, then back; yields the sites of each segment, the last segment's first, when all their samples are done.

        `tap` gets the gradients of a site sample after sample; where a loss does not depend on the site's output it is not
        called.

        Raises:
            InputError: a loss or a gradient that is not finite; names the sample or the layer.
        """
        between = self._forward()
        given: Values | None = None
        for index in reversed(range(len(self.stretches))):
            passed = Values(self._wanting(index), self._folder()) if index else None
            self._back(index, between, given, passed, tap)
            if index:
                between[index - 1].close()
            if given is not None:
                given.close()
            given = passed
            yield [site for wave in self.stretches[index].waves for site in wave.sites]

    def rows(self, site: Site, sample: int) -> int:
        """Rows of the site's output, once its segment has been run."""
        return self._rows[site.name, sample]

    def _most_rows(self, site: Site) -> int:
        sizes = [size_of(size, self.bound) for size in site.node.meta["val"].shape[:-1]]
        return len(self.samples) * math.prod(sizes)

    def _folder(self) -> Path | None:
        return self.context.scratch if self._plan.spill else None

    def _forward(self) -> list[Values]:
        """Of every cut the values of every sample."""
        between: list[Values] = []
        for index, stretch in enumerate(self.stretches[:-1]):
            made = set(stretch.nodes)
            wanted = [node for node in stretch.outputs if node in made]
            run = Executor(self.graph, stretch.nodes, wanted, {}, self._plan.cache_bytes, device=self.context.device)
            outputs = Values(stretch.outputs, self._folder())
            for sample in range(len(self.samples)):
                start = self._start(index, between, sample)
                values = run.run(start)
                outputs.append(values | {node: start[node] for node in stretch.outputs if node not in made})
            between.append(outputs)
        return between

    def _start(self, index: int, between: list[Values], sample: int) -> dict[Node, Any]:
        device = self.context.device
        start = dict(zip(self._placeholders, moved(self._leaves[sample], device), strict=True))
        return start | moved(between[index - 1][sample], device) if index else start

    def _wanting(self, index: int) -> list[Node]:
        """The values at the beginning of a segment that gradients go on to: some site's output moves them."""
        return [node for node in self.stretches[index].inputs if node in self._moved]

    def _back(self, index: int, between: list[Values], given: Values | None, passed: Values | None, tap: Tap) -> None:
        stretch, last, device = self.stretches[index], given is None, self.context.device
        made = set(stretch.nodes)
        sites = {site.node: site for wave in stretch.waves for site in wave.sites}
        ends = self.ends if last else ()
        carried_on = [node for node in stretch.outputs if node in self._moved]
        wanted = {node: None for node in [*ends, *carried_on, *sites] if node in made}
        run = Executor(self.graph, stretch.nodes, list(wanted), {}, self._plan.cache_bytes, gradients=True, device=device)
        for sample in range(len(self.samples)):
            start = self._start(index, between, sample)
            leaves = {node: _tree_map(_leaf, start[node]) for node in self._wanting(index)} if index else {}
            hooks: list[Any] = []

            def seen(node: Node, value: torch.Tensor, sample: int = sample, hooks: list[Any] = hooks) -> None:
                if node in sites:
                    self._hook(sites[node], sample, value, tap, hooks)

            read = {node: _tree_map(_shown, leaf) for node, leaf in leaves.items()}
            values = read | run.run(start | read, seen)
            gradients = self._loss_gradients(sample, start | values) if last else moved(given[sample], device)  # type: ignore[index]
            self._propagate(values, gradients)
            for hook in hooks:
                hook.remove()
            if passed is not None:
                passed.append({node: _tree_map(lambda x: x.grad, leaf) for node, leaf in leaves.items()})

    def _hook(self, site: Site, sample: int, value: torch.Tensor, tap: Tap, hooks: list[Any]) -> None:
        self._rows[site.name, sample] = value.numel() // value.shape[-1]
        if not value.requires_grad:
            value.requires_grad_()  # nothing before it is asked for

        def taken(gradient: torch.Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                raise InputError(
                    f"layer {site.name}: the gradient of its output is not finite in calibration sample {sample}; "
                    "check the checkpoint and the calibration text"
                )
            tap(site, sample, gradient)

        hooks.append(value.register_hook(taken))

    def _loss_gradients(self, sample: int, values: Mapping[Node, Any]) -> dict[Node, torch.Tensor | None]:
        leaves = {node: _leaf(values[node]) for node in self.ends}
        with torch.enable_grad():
            loss = self._loss(moved(self.samples[sample], self.context.device), list(leaves.values())) * self._scale
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss of calibration sample {sample} is {loss.item()}; check the checkpoint and the text")
        loss.backward()
        return {node: leaf.grad for node, leaf in leaves.items()}

    @staticmethod
    def _propagate(values: Mapping[Node, Any], gradients: Mapping[Node, Any]) -> None:
        ends, given = [], []
        for node, gradient in gradients.items():
            if node not in values or gradient is None:
                continue
            several = isinstance(values[node], (list, tuple))
            pairs = zip(values[node], gradient, strict=True) if several else [(values[node], gradient)]
            for end, own in pairs:
                if own is not None and end.requires_grad:
                    ends.append(end)
                    given.append(own)
        if ends:
            torch.autograd.backward(ends, given)


def _downstream(starts: Sequence[Node], nodes: Sequence[Node]) -> set[Node]:
    """The floating values that a start moves, itself included."""
    moved = set(starts)
    for node in nodes:
        if any(source in moved for source in node.all_input_nodes) and _floating(node.meta.get("val")):
            moved.add(node)
    return moved


def _floating(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_floating(item) for item in value)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _tree_map(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Of a tensor, or of each of the several that an op gives."""
    return tuple(map(function, value)) if isinstance(value, (list, tuple)) else function(value)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    return value.detach().requires_grad_()


def _shown(leaf: torch.Tensor) -> torch.Tensor:
    """The leaf as later segments gave their gradient of it. It is a root of the pass, so that gradients are summed in the order
    in which they would be without cuts, later users first: no budget changes a bit."""
    return leaf.view_as(leaf)
