"""How much each solved layer's own output changes: the float graph runs on samples, both products from the same input."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from qcompiler.numerics.affine import CHUNK, decibel
from qcompiler.passes.rewrite.quantize_sites import packed
from qcompiler.passes.rewrite.site_product import SiteProduct
from qcompiler.runtime.device import free_bytes
from qcompiler.sweep.order import Stretch
from qcompiler.sweep.place import CPU, moved, working_on
from qcompiler.sweep.room import alive_bytes, constant_bytes
from qcompiler.sweep.sizes import bindings

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


class _Probe(Interpreter):
    """Runs the float graph and, beside each site, its quantized product on the same input."""

    def __init__(self, graph: Graph, context: Context, device: str):
        super().__init__(graph.module)
        self.context, self.device = context, device
        self.sites = {s.node: s for s in graph.sites if s.kind != "embedding" and s.name in context.solutions}
        self.graph_constant = graph.constant
        self.products = {s.name: self._product(graph, s, context) for s in self.sites.values()}
        self.hit: dict[str, set[int]] = {s.name: set() for s in self.sites.values() if s.kind == "experts"}
        self.sums = {s.name: [0.0, 0.0] for s in self.sites.values()}

    def missed(self) -> dict[str, list[int]]:
        """Experts that no row was for, by the site's name."""
        found = {s.name: sorted({*range(s.experts)} - self.hit[s.name]) for s in self.sites.values() if s.name in self.hit}
        return {name: experts for name, experts in found.items() if experts}

    @staticmethod
    def _product(graph: Graph, site: Site, context: Context) -> SiteProduct:
        weight = graph.constant(site.weight) if site.name in context.outliers else None
        solution, scheme = context.solutions[site.name], context.schemes[site.name]
        return SiteProduct.of(site, solution, scheme, context, weight, packed(site.name, context))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # read where it is used: all of them at once would be the whole model in float32

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        if self.device == CPU:
            read = lambda node: self.graph_constant(str(node.target)) if node.op == "get_attr" else self.env[node]  # noqa: E731
            return map_arg(args, read)
        place = torch.device(self.device)
        read = lambda node: self.graph_constant(str(node.target)).to(place) if node.op == "get_attr" else self.env[node]  # noqa: E731
        return map_aggregate(map_arg(args, read), lambda value: place if isinstance(value, torch.device) else value)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        site = self.sites.get(node)
        if site is not None:
            first = 3 if site.kind == "experts" else 2
            # without the weight: it was read once already
            given = tuple(None if i == first - 1 else argument for i, argument in enumerate(node.args))
            arguments: Any = self.map_nodes_to_values(given, node)
            experts = arguments[1] if site.kind == "experts" else None
            own = arguments[first] if len(arguments) > first else None
            # Only while it is used: all of them at once would be the whole quantized model.
            made = self.products[site.name]
            quantized = dataclasses.replace(made, tensors=moved(made.tensors, self.device))(arguments[0], own, experts)
            sums = self.sums[site.name]
            # the bias is no part of the product: a large one would hide the error
            bias = result.new_zeros(()) if own is None else own
            if experts is not None:
                self.hit[site.name].update(experts.unique().tolist())
                bias = bias if own is None else own[experts]
            sums[0] += _square_sum(result, bias)
            sums[1] += _square_sum(result, quantized)
        return result


def _square_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    """Σ (x − y)² in float64, some rows at a time: the logits of a window may take more than a layer."""
    rows = [t.reshape(-1, t.shape[-1]).split(max(1, CHUNK // t.shape[-1])) for t in torch.broadcast_tensors(x, y)]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b in zip(*rows, strict=True):
        total += (a - b).double().square().sum()
    return total.item()


def _place(graph: Graph, context: Context, samples: list[dict[str, Any]]) -> str:
    """The context's device, unless a sample's values do not fit there: this is no step to give up a solved model for."""
    free = free_bytes(torch.device(context.device))
    if free is None:
        return context.device
    nodes = list(graph.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    calls = tuple(node for node in nodes if node.op == "call_function")
    needed = 0
    for leaves in map(torch.utils._pytree.tree_leaves, samples):
        bound = bindings(placeholders, leaves)
        weights = 2 * max((constant_bytes(node, bound) for node in calls), default=0)
        results = tuple(graph.module.graph.output_node().all_input_nodes)
        needed = max(needed, alive_bytes(Stretch(calls, (), tuple(placeholders), results), bound) + 2 * weights)
    if needed <= free:
        return context.device
    context.reporter.note(
        f"the layers' output SQNR is measured on the CPU: it takes {needed:,} bytes, {free:,} are free on {context.device}"
    )
    return CPU


def output_sqnr(graph: Graph, context: Context, samples: list[dict[str, Any]]) -> dict[str, float]:
    """10·log10(Σ y² / Σ (y − ỹ)²) of every solved linear site over `samples`, in dB; y without its bias.

    Empty when there are no samples. Run before the rewrite, while the graph is in float.
    """
    if not samples:
        return {}
    device = _place(graph, context, samples)
    probe = _Probe(graph, context, device)
    with torch.no_grad(), working_on(device):
        for index, sample in enumerate(samples):
            context.reporter.layer(index + 1, len(samples), "sample")
            # the graph's placeholders take the flattened leaves of the keyword arguments, in order
            probe.run(*moved(torch.utils._pytree.tree_leaves(sample), device))
    for name, missed in probe.missed().items():
        numbers = ", ".join(map(str, missed))
        context.reporter.note(f"{name}: no row of the samples meets expert {numbers}; measured without")
    return {name: decibel(signal, noise) for name, (signal, noise) in probe.sums.items()}
