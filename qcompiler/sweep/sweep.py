"""All calibration samples through one segment at a time; sites are solved in waves, quantized predecessors in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils import _pytree

from qcompiler.errors import InputError, UsageError
from qcompiler.graph.graph import Graph, Site
from qcompiler.sweep.budget import Costs, plan_cuts
from qcompiler.sweep.execute import Executor, Product
from qcompiler.sweep.order import Group, Order, Stretch, Wave, order
from qcompiler.sweep.place import moved
from qcompiler.sweep.product import product
from qcompiler.sweep.sizes import bindings, node_bytes
from qcompiler.sweep.values import Values

if TYPE_CHECKING:
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep.solutions import Solution

Tap = Callable[..., None]


class Sweep:
    """Iterate over the segments of a graph; leaving a segment runs it to its end for every sample.

        sweep = Sweep(graph, context, sites)
        for segment in sweep:
            for wave in segment.waves:
                taps = {group.node: Hessian(group.k).update for group in wave.groups}
                segment.feed(taps)
                …
                segment.place(site, solution)

    Sites that `context.solutions` holds run quantized in the main stream from the start. Values that live across a cut are
    kept in memory where the budget has room, else in a file in `context.scratch`.

    Args:
        graph: after analysis, in float.
        context: its samples, solutions, budget.
        sites: linear sites whose inputs are wanted.
        float_stream: run a second stream in which nothing is quantized, beside the first.
        costs: what the caller holds for a group while its statistics gather and while its sites are solved.
        cuts: where to cut, of the order's cuts; by default wherever little is alive. A budget may add some.

    Raises:
        UsageError: there are no samples.
        CapacityError: no way of cutting the graph keeps the budget.
    """

    def __init__(
        self,
        graph: Graph,
        context: Context,
        sites: Sequence[Site],
        *,
        float_stream: bool = False,
        costs: Costs | None = None,
        cuts: Callable[[Order], list[int]] | None = None,
    ):
        self.graph = graph
        self.cuts = cuts
        self.context = context
        self.sites = [site for site in sites if site.kind != "embedding"]
        self.placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
        self.samples = [_pytree.tree_leaves(sample) for sample in context.samples()]
        if not self.samples:
            raise UsageError("this recipe needs calibration samples, and there are none; give text (--text) or samples")
        for index, leaves in enumerate(self.samples):
            if len(leaves) != len(self.placeholders):
                raise UsageError(f"sample {index} has {len(leaves)} values, the graph takes {len(self.placeholders)}")
        largest = max(self.samples, key=_elements)
        self.bound = bindings(self.placeholders, largest)
        self.float_stream = float_stream
        self.order: Order = order(graph, self.sites, lambda node: node_bytes(node, self.bound))
        chosen, self._plan = plan_cuts(self, costs or Costs())
        self.stretches: list[Stretch] = self.order.stretches(chosen)

    def __iter__(self) -> Iterator[Segment]:
        streams = (False, True) if self.float_stream else (False,)
        inputs: list[Values] = []
        for index, stretch in enumerate(self.stretches):
            segment = Segment(self, stretch, index, inputs, self._plan.cache_bytes)
            yield segment
            if index + 1 < len(self.stretches):
                folder: Path | None = self.context.scratch if self._plan.spill else None
                outputs = [Values(stretch.outputs, folder) for _ in streams]
                segment.finish(outputs)
                for values in inputs:
                    values.close()
                inputs = outputs
        for values in inputs:
            values.close()

    def start(self, sample: int) -> dict[Node, Any]:
        """The graph's inputs for a sample, where the context computes."""
        return dict(zip(self.placeholders, moved(self.samples[sample], self.context.device), strict=True))


class Segment:
    """One segment, with the values of every sample at its beginning.

    Attributes:
        waves: what can be solved in it, in order; within a wave no site depends on another.
        index: its number, from 0.
    """

    def __init__(self, sweep: Sweep, stretch: Stretch, index: int, inputs: list[Values], cache_bytes: int):
        self._sweep = sweep
        self._stretch = stretch
        self._inputs = inputs
        self._cache_bytes = cache_bytes
        self._products: dict[Node, Product] = {}
        self.index = index
        context = sweep.context
        for site in sweep.graph.sites:
            if site.name in context.solutions and site.node in set(stretch.nodes):
                self._products[site.node] = product(sweep.graph, site, context)

    @property
    def waves(self) -> tuple[Wave, ...]:
        return self._stretch.waves

    @property
    def samples(self) -> int:
        return len(self._sweep.samples)

    def feed(self, taps: Mapping[Node | tuple[Node, ...], Tap]) -> None:
        """Run every sample as far as the tapped nodes need.

        A tap is called once a sample with the node's value as `[tokens, k]` (a vector stays one); with a float stream with
        two of them, the same tokens in the main and in the float stream. A tap of several nodes gets all their values of
        the main stream, then all of the float one.

        Raises:
            InputError: a value that is not finite; names the layer and the sample.
        """
        wanted = [node for key in taps for node in (key if isinstance(key, tuple) else (key,))]
        runs = [self._executor(wanted, products) for products in self._streams()]
        for sample in range(self.samples):
            seen: list[dict[Node, Any]] = []
            for stream, run in enumerate(runs):
                values = run.run(self._start(sample, stream))
                for node in wanted:
                    self._check(node, values[node], sample)
                seen.append(values)
            for key, tap in taps.items():
                nodes = key if isinstance(key, tuple) else (key,)
                tap(*(_rows(values[node]) for values in seen for node in nodes))

    def run(
        self, sample: int, wanted: Sequence[Node], products: Mapping[Node, Product] | None = None, gradients: bool = False
    ) -> dict[Node, Any]:
        """Values of nodes of the segment for one sample, from the main stream's values at its beginning.

        Args:
            products: instead of the sites' quantized products; an empty mapping computes in float.
            gradients: keep what a backward pass needs.
        """
        given = self._products if products is None else dict(products)
        device = self._sweep.context.device
        run = Executor(self._sweep.graph, self._stretch.nodes, wanted, given, self._cache_bytes, gradients, device=device)
        return run.run(self._start(sample, 0))

    @property
    def outputs(self) -> list[Node]:
        """Values made in the segment that something after it needs; of the last one, its last sites' results."""
        made = set(self._stretch.nodes)
        found = [node for node in self._stretch.outputs if node in made]
        return found or [site.node for site in self.waves[-1].sites]

    def place(self, site: Site, solution: Solution, mapped: bool = False) -> None:
        """Record the site's solution; everything that runs from now on sees its quantized product.

        `mapped` says that its tensors lie in a file that stays.
        """
        context = self._sweep.context
        if mapped:
            context.solutions.keep(site.name, solution)
        else:
            context.solutions[site.name] = solution
        self._products[site.node] = product(self._sweep.graph, site, context)

    def refresh(self, site: Site) -> None:
        """The site's bias, range or format changed: make its product anew."""
        self._products[site.node] = product(self._sweep.graph, site, self._sweep.context)

    def shift(self, site: Site, by: torch.Tensor) -> None:
        """Add `by` `[n]` to a solved site's bias, in the main stream alone: the graph's bias is the float stream's too."""
        made = self._products[site.node]
        self._products[site.node] = lambda x, weight=None, bias=None: made(x, weight, by if bias is None else bias + by)

    def finish(self, outputs: list[Values]) -> None:
        """Run every sample to the end and keep what later segments need. The sweep calls it."""
        wanted = list(self._stretch.outputs)
        carried = [node for node in wanted if node not in set(self._stretch.nodes)]
        for stream, products in enumerate(self._streams()):
            run = self._executor([node for node in wanted if node not in carried], products)
            for sample in range(self.samples):
                start = self._start(sample, stream)
                values = run.run(start)
                outputs[stream].append(values | {node: start[node] for node in carried})

    def _streams(self) -> list[dict[Node, Product]]:
        return [self._products, {}] if self._sweep.float_stream else [self._products]

    def _executor(self, wanted: Sequence[Node], products: dict[Node, Product]) -> Executor:
        device = self._sweep.context.device
        return Executor(self._sweep.graph, self._stretch.nodes, wanted, products, self._cache_bytes, device=device)

    def _start(self, sample: int, stream: int) -> dict[Node, Any]:
        start = self._sweep.start(sample)
        return start | moved(self._inputs[stream][sample], self._sweep.context.device) if self._inputs else start

    def _check(self, node: Node, value: Any, sample: int) -> None:
        if torch.is_tensor(value) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            raise InputError(
                f"layer {self._name(node)}: its input holds {kind} in calibration sample {sample}; "
                "expected finite activations: check the checkpoint and the calibration text"
            )

    def _name(self, node: Node) -> str:
        for wave in self.waves:
            for group in wave.groups:
                if group.node is node:
                    return ", ".join(site.name for site in group.sites)
                for site in group.sites:
                    if site.node is node:
                        return site.name
        return node.name


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1]) if value.dim() > 1 or value.is_floating_point() else value


def _elements(leaves: list[Any]) -> int:
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))


__all__ = ["Group", "Segment", "Sweep", "Wave"]
