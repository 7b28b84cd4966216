"""Choose each group's clipping range by the error of the layer's output.

W  ─▶  (q, S[, Z]) rounded within the range, of 1.0 … 0.5 times min-max, that makes E[(w_g·x_g − w̃_g·x_g)²] least
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qcompiler.numerics import affine
from qcompiler.numerics.clipping import BlockHessian, fit_clipped
from qcompiler.passes.solve.selection import integer_format, unsolved
from qcompiler.passes.solve.weights import quantizable_weight
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.solve import solve_sites

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.numerics.affine import AffineWeight
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep import Group

COPIES = 5  # of a weight that the search holds


@dataclass(frozen=True)
class ClipSearch(Pass):
    """Round every selected linear site to nearest, in ranges found on the calibration samples.

    Sites of a shared weight and per-tensor scales are left to the next solve pass.

    Attributes:
        error: `output` (dᵀ H_gg d, H_gg the second moments of a group's inputs) or `diagonal` (their diagonal alone:
            Σ_j E[x_j²] d_j², with the factors of `round_to_nearest`).
        select: which sites; by default all but the head.
        head: solve the site of role `head` too.
    """

    name: ClassVar[str] = "clip_search"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    error: Literal["output", "diagonal"] = "output"
    select: Select = Select()
    head: bool = False

    def run(self, graph: Graph, context: Context) -> Report:
        sites, skipped = unsolved(self.name, graph, context, self.select, head=self.head)
        chosen = []
        for site in sites:
            reason = _refusal(site, context)
            if reason is None:
                chosen.append(site)
            else:
                skipped.append(Skip(site.name, reason))
        if not chosen:
            return Report(skipped=skipped)
        method = _Method(self, graph, context)
        sweep = Sweep(graph, context, chosen, costs=Costs(method.statistics_bytes, method.solver_bytes))
        report = solve_sites(self, graph, context, chosen, sweep, method)
        report.skipped += skipped
        report.notes["samples"] = len(sweep.samples)
        return report


def _refusal(site: Site, context: Context) -> str | None:
    if site.kind != "linear":
        return f"a site of kind {site.kind}"
    if site.tie_group is not None:
        return "its weight is shared with a reader that has other inputs"
    if context.schemes[site.name].per_tensor:
        return "one scale for the whole matrix; the search is for scales of groups and rows"
    return None


class _Statistics:
    """Second moments of a group's input, in the widths that its sites' formats ask for."""

    def __init__(self, k: int, widths: set[int]):
        self.blocks = {width: BlockHessian(k, width) for width in sorted(widths)}

    def update(self, x: torch.Tensor) -> None:
        for block in self.blocks.values():
            block.update(x)


@dataclass(frozen=True)
class _Method:
    step: ClipSearch
    graph: Graph
    context: Context

    def widths(self, group: Group) -> set[int]:
        if self.step.error == "diagonal":
            return {1}
        return {self.context.schemes[site.name].weight_format.group or group.k for site in group.sites}

    def statistics_bytes(self, group: Group) -> int:
        return sum(4 * group.k * width for width in self.widths(group))

    def solver_bytes(self, group: Group) -> int:
        return 4 * COPIES * group.k * max(site.shape[0] for site in group.sites) + self.statistics_bytes(group)

    def statistics(self, group: Group) -> _Statistics:
        return _Statistics(group.k, self.widths(group))

    def solve(self, site: Site, statistics: _Statistics) -> tuple[AffineWeight, dict[str, Any], str | None]:
        format = integer_format(self.context, site)
        weight = quantizable_weight(self.graph, self.context, site)
        width = 1 if self.step.error == "diagonal" else format.group or site.shape[1]
        moments = statistics.blocks[width]
        blocks, fallback = moments.result(), None
        if not blocks.any():
            blocks = torch.eye(width).expand(len(blocks), width, width)
            fallback = "no calibration token reached it; the error of the weight was searched instead of the output's"
        if self.step.error == "diagonal":
            solution = affine.fit(weight, format, importance=blocks.flatten())
            numbers: dict[str, Any] = {}
        else:
            found = fit_clipped(weight, format, blocks)
            solution = found.weight
            signal = found.signal or 1.0
            numbers = {
                "error_before": found.error_before / signal,
                "error_after": found.error_after / signal,
                "clipped_share": (found.factors < 1).float().mean().item(),
            }
        numbers |= {"weight_sqnr_db": affine.sqnr_db(weight, solution.dequantize()), "tokens": moments.tokens}
        return solution, numbers | {"clipping": self.step.error}, fallback
