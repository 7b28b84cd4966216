"""How much each solved layer's own output changes: the float graph runs on samples, both products from the same input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node

from qcompiler.ops.formats import LAYOUT_VERSION
from qcompiler.ops.torch_ops import overload
from qcompiler.passes.rewrite.quantize_sites import pack

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


class _Probe(Interpreter):
    """Runs the float graph and, beside each site, its quantized product on the same input."""

    def __init__(self, graph: Graph, context: Context):
        super().__init__(graph.module)
        self.context = context
        self.sites = {s.node: s for s in graph.sites if s.kind == "linear" and s.name in context.solutions}
        self.packed = {s.name: pack(context.solutions[s.name]) for s in self.sites.values()}
        self.sums = {s.name: [0.0, 0.0] for s in self.sites.values()}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        site = self.sites.get(node)
        if site is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            quantized = self._quantized(site, arguments[0], arguments[2] if len(arguments) > 2 else None)
            sums = self.sums[site.name]
            # the bias is no part of the product: a large one would hide the error
            bias = arguments[2] if len(arguments) > 2 and arguments[2] is not None else 0
            sums[0] += (result - bias).double().square().sum().item()
            sums[1] += (result - quantized).double().square().sum().item()
        return result

    def _quantized(self, site: Site, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        format = self.context.solutions[site.name].format
        packed = self.packed[site.name]
        sizes = (
            format.bits,
            format.group,
            *site.shape,
            int(self.context.schemes[site.name].activation),
            LAYOUT_VERSION,
        )
        return overload("linear_nbit")(x, packed["codes"], packed["scales"], packed.get("zeros"), bias, *sizes)


def output_sqnr(graph: Graph, context: Context, samples: list[dict[str, Any]]) -> dict[str, float]:
    """10·log10(Σ y² / Σ (y − ỹ)²) of every solved linear site over `samples`, in dB; y without its bias.

    Empty when there are no samples. Run before the rewrite, while the graph is in float.
    """
    if not samples:
        return {}
    probe = _Probe(graph, context)
    with torch.no_grad():
        for index, sample in enumerate(samples):
            context.reporter.layer(index + 1, len(samples), "sample")
            # the graph's placeholders take the flattened leaves of the keyword arguments, in order
            probe.run(*torch.utils._pytree.tree_leaves(sample))
    return {name: _db(signal, noise) for name, (signal, noise) in probe.sums.items()}


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
