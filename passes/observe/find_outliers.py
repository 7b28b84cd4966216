"""Find the input columns whose size would widen every int8 scale, to keep them in float beside the product.

x · Wᵀ  ─▶  int8(x without O) · int8(W without O)ᵀ + x[:, O] · W[:, O]ᵀ     (the rewrite does it; here O is found)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from qcompiler.ops.formats import Activation
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select, VqScheme
from qcompiler.sweep import Sweep
from qcompiler.sweep.reducers import AbsMax

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep import Group


@dataclass(frozen=True)
class FindOutliers(Pass):
    """LLM.int8() (arXiv 2208.07339) with a fixed set of columns a site, found on the calibration samples.

    The paper looks for outliers in every batch anew, so that a row's result depends on the rows beside it; here the set is
    part of the compiled model. Where more than `max_share` of the columns are outliers the largest are kept.

    Attributes:
        threshold: a column is an outlier when some |x| of it is at least this.
        max_share: of a site's columns, the most that may stay in float.
        beyond: what a site with more of them is: a `fallback`, which fails the run unless the recipe allows it, or, with
            `keep_largest`, as asked for: then it is only reported.
        select: which sites.
    """

    name: ClassVar[str] = "llm_int8"
    stage: ClassVar[str] = "observe"
    required: ClassVar[bool] = True

    threshold: float = 6.0
    max_share: float = 0.02
    beyond: Literal["fallback", "keep_largest"] = "fallback"
    select: Select = Select()

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share must be in [0, 1], got {self.max_share}")

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        sites = [site for site in graph.sites if site.kind != "embedding" and self._takes(site, context, report)]
        report.matched = len(sites)
        if not sites:
            return report
        for segment in (sweep := Sweep(graph, context, sites)):
            for wave in segment.waves:
                largest = {group: AbsMax(group.k) for group in wave.groups}
                segment.feed({group.node: reducer.update for group, reducer in largest.items()})
                for group, reducer in largest.items():
                    self._choose(group, reducer.result(), context, report)
        report.notes |= {"samples": len(sweep.samples), "columns": sum(len(o) for o in context.outliers.values())}
        return report

    def _takes(self, site: Site, context: Context, report: Report) -> bool:
        scheme = context.schemes.get(site.name)
        if scheme is None:
            reason = context.left_in_float.get(site.name, "no format")
        elif site.kind != "linear":
            reason = f"a site of kind {site.kind} has no mixed product"
        elif isinstance(scheme, VqScheme):
            reason = f"{scheme.weight_format.label} has no mixed product"
        elif scheme.activation is Activation.FLOAT:
            reason = "its activations stay in float: outliers widen nothing"
        elif site.name in context.solutions:
            reason = "solved already, with its outlier columns; put llm_int8 before the solve passes"
        elif site.tie_group is not None:
            reason = "its weight is shared, and the other reader needs every column of it"
        elif not self.select.matches(site.name, site.role, site.shape[0] * site.shape[1]):
            reason = "not selected"
        else:
            return True
        report.skipped.append(Skip(site.name, reason))
        return False

    def _choose(self, group: Group, largest: torch.Tensor, context: Context, report: Report) -> None:
        """All sites of a group read one value: they share its outliers."""
        found = (largest >= self.threshold).nonzero().flatten()
        over = len(found)
        allowed = math.floor(self.max_share * group.k)
        if over > allowed:
            share = math.ceil(1000 * over / group.k) / 1000
            reason = (
                f"{over} of {group.k} input columns reach {self.threshold:g} and {allowed} may stay in float; the others "
                f"are rounded with the rest. Set llm_int8: {{max_share: {share:g}}}, or a threshold above {self.threshold:g} "
                f"(the largest value is {largest.max():.4g})"
            )
            reported = report.fallbacks if self.beyond == "fallback" else report.skipped
            reported += [Skip(site.name, reason) for site in group.sites]
            # the largest first; of equals the first
            order = torch.argsort(largest[found], descending=True, stable=True)
            found = found[order[:allowed]].sort().values
        for site in group.sites:
            context.reporter.layer(len(report.layers) + 1, report.matched, site.name, f"{len(found)} outliers")
            report.layers[site.name] = {
                "columns_over_threshold": over,
                "largest_activation": largest.max().item(),
            }
            if len(found):
                context.outliers[site.name] = found.cpu()
                report.layers[site.name]["outlier_columns"] = len(found)
                report.changed += 1
