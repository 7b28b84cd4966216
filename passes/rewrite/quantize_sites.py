"""Replace every solved site by the op that reads its packed weight.

linear(x, W, b)   ─▶  qcompiler::linear_nbit(x, codes, scales[, zeros], b[, static range])
linear(x, W, b)   ─▶  qcompiler::linear_mixed(x, codes, scales[, zeros], columns, outliers, b[, static range])
experts_linear(x, i, W, b) ─▶  qcompiler::linear_experts_nbit(x, i, codes, scales[, zeros], b)
embedding(W, ids) ─▶  qcompiler::embedding_nbit(ids, codes, scales[, zeros])
vector-quantized  ─▶  qcompiler::linear_vq, embedding_vq: codes, codebooks, codebook_scales, scales
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qcompiler.errors import GateError
from qcompiler.graph import constants
from qcompiler.graph.mapped import kept
from qcompiler.ops.packing import packed_bytes_of
from qcompiler.ops.spec import SPECS
from qcompiler.ops.torch_ops import overload
from qcompiler.passes.rewrite.site_product import WEIGHT, attributes, op_name, own_bytes, own_tensors, pack
from qcompiler.pipeline.passes import Pass, Report, Skip

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


def packed(site: str, context: Context) -> dict[str, torch.Tensor]:
    """What `pack` makes of the site's solution; made once a solution, mapped from files in `context.scratch`."""
    solution = context.solutions[site]
    held = context.packed.get(id(solution))
    if held is None or held[0] is not solution:
        held = context.packed[id(solution)] = (solution, kept(pack(solution), context.scratch, site))
    return held[1]


@dataclass(frozen=True)
class QuantizeSites(Pass):
    """One packed tensor a storage: tied sites read the same buffers. The float weights leave the graph."""

    name: ClassVar[str] = "quantize_sites"
    stage: ClassVar[str] = "rewrite"
    required: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report(matched=len(graph.sites))
        owners: dict[int, str] = {}
        left = [s.name for s in graph.sites if s.name in context.schemes and s.name not in context.solutions]
        if left:
            raise GateError(
                f"no pass of the recipe solved {len(left)} layers that it gives a format ({', '.join(left[:4])}"
                f"{', …' if len(left) > 4 else ''}); end its passes with round_to_nearest"
            )
        for site in graph.sites:
            solution = context.solutions.get(site.name)
            if solution is None:
                report.skipped.append(Skip(site.name, context.left_in_float.get(site.name, "no format")))
                continue
            owner = site.name if site.tie_group is None else owners.setdefault(site.tie_group, site.name)
            if owner == site.name:
                for name, tensor in packed(site.name, context).items():
                    constants.add_buffer(graph.module, f"{owner}.{name}", tensor)
            scheme = context.schemes[site.name]
            weight = graph.constant(site.weight) if site.name in context.outliers else None
            own = own_tensors(site, solution, scheme, context, weight)
            for name, tensor in own.items():
                constants.add_buffer(graph.module, f"{site.name}.{name}", tensor)
            self._replace(graph, site, owner, op_name(site, solution, own), attributes(site, solution, scheme))
            beside = own_bytes(site, own)
            packed_size = site.experts * sum(packed_bytes_of(*site.shape, solution.format).values())
            size = packed_size + sum(beside.values())
            report.layers[site.name] = {
                "format": solution.format.label,
                "bytes": size,
                "bits_per_weight": round(8 * size / site.size, 4),
                "packed_as": owner,
            }
            if beside:
                report.layers[site.name]["beside"] = beside
            if "columns" in own:
                report.layers[site.name]["outlier_columns"] = len(own["columns"])
            report.changed += 1
        graph.module.graph.eliminate_dead_code()
        report.notes["dropped_constants"] = len(constants.drop_unused(graph.module))
        graph.module.recompile()
        return report

    @staticmethod
    def _replace(
        graph: Graph, site: Site, owner: str, op: str, attributes: dict[str, int]
    ) -> None:
        """Put the site's op in its place; `owner` holds the packed weight, the site itself everything else."""
        node, fx = site.node, graph.module.graph
        spec = SPECS[op]
        given: dict[str, Any]
        if site.kind == "embedding":
            given = {"indices": node.args[1]}
        elif site.kind == "experts":
            given = dict(zip(("x", "expert", "bias"), (*node.args[:2], *node.args[3:]), strict=False))
        else:
            given = {"x": node.args[0], "bias": node.args[2] if len(node.args) > 2 else None}
        with fx.inserting_before(node):
            for name in (i.name for i in spec.inputs):
                held = f"{owner if name in WEIGHT else site.name}.{name}"
                if name not in given and constants.has_attribute(graph.module, held):
                    given[name] = fx.get_attr(held)
                    given[name].meta["val"] = constants.attribute(graph.module, held)
            inputs = [given.get(i.name) for i in spec.inputs]
            new = fx.call_function(overload(spec.name), (*inputs, *spec.values(attributes)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        fx.erase_node(node)
        site.node = new
