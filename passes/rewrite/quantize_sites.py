"""Replace every solved site by the op that reads its packed weight.

linear(x, W, b)   ─▶  qcompiler::linear_nbit(x, codes, scales[, zeros], b)
embedding(W, ids) ─▶  qcompiler::embedding_nbit(ids, codes, scales[, zeros])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from qcompiler.graph import constants
from qcompiler.ops import layout
from qcompiler.ops.formats import LAYOUT_VERSION
from qcompiler.ops.torch_ops import overload
from qcompiler.pipeline.passes import Pass, Report, Skip

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.numerics.affine import AffineWeight
    from qcompiler.pipeline.context import Context


def pack(solution: AffineWeight) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points in the layout of the kernels (docs/layout.md), by input name."""
    bits = solution.format.bits
    packed = {
        "codes": layout.pack_codes(solution.codes.numpy(), bits),
        "scales": layout.pack_scales(solution.scales.numpy()),
    }
    if solution.zeros is not None:
        packed["zeros"] = layout.pack_zeros(solution.zeros.numpy(), bits)
    return {name: torch.from_numpy(array) for name, array in packed.items()}


@dataclass(frozen=True)
class QuantizeSites(Pass):
    """One packed tensor a storage: tied sites read the same buffers. The float weights leave the graph."""

    name: ClassVar[str] = "quantize_sites"
    stage: ClassVar[str] = "rewrite"
    required: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report(matched=len(graph.sites))
        owners: dict[int, str] = {}
        for site in graph.sites:
            solution = context.solutions.get(site.name)
            if solution is None:
                report.skipped.append(Skip(site.name, context.left_in_float.get(site.name, "no pass solved it")))
                continue
            owner = site.name if site.tie_group is None else owners.setdefault(site.tie_group, site.name)
            if owner == site.name:
                for name, tensor in pack(solution).items():
                    constants.add_buffer(graph.module, f"{owner}.{name}", tensor)
            self._replace(graph, site, owner, solution, context)
            sizes = layout.packed_bytes(*site.shape, solution.format)
            report.layers[site.name] = {
                "format": solution.format.label,
                "bytes": sum(sizes.values()),
                "bits_per_weight": round(8 * sum(sizes.values()) / (site.shape[0] * site.shape[1]), 4),
                "packed_as": owner,
            }
            report.changed += 1
        graph.module.graph.eliminate_dead_code()
        report.notes["dropped_constants"] = len(constants.drop_unused(graph.module))
        graph.module.recompile()
        return report

    @staticmethod
    def _replace(graph: Graph, site: Site, owner: str, solution: AffineWeight, context: Context) -> None:
        node, fx = site.node, graph.module.graph
        n, k = site.shape
        format = solution.format
        with fx.inserting_before(node):
            names = ["codes", "scales"] + ([] if solution.zeros is None else ["zeros"])
            packed = {name: fx.get_attr(f"{owner}.{name}") for name in names}
            for name, constant in packed.items():
                constant.meta["val"] = constants.attribute(graph.module, f"{owner}.{name}")
            sizes = (format.bits, format.group, n, k)
            tensors = (packed["codes"], packed["scales"], packed.get("zeros"))
            if site.kind == "embedding":
                arguments = (node.args[1], *tensors, *sizes, LAYOUT_VERSION)
                new = fx.call_function(overload("embedding_nbit"), arguments)
            else:
                bias = node.args[2] if len(node.args) > 2 else None
                activation = int(context.schemes[site.name].activation)
                new = fx.call_function(
                    overload("linear_nbit"), (node.args[0], *tensors, bias, *sizes, activation, LAYOUT_VERSION)
                )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        fx.erase_node(node)
        site.node = new
