"""Measure how much the end of the model cares about every token at every layer.

z = linear(x, W)  ─▶  s[token, group] = mean over the group's outputs of (∂l/∂z)², of mean 1 a group
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qcompiler.graph.mapped import kept
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep.gradients import output_gradients
from qcompiler.sweep.losses import Labels

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context

# Share of the tokens whose share of the weight is reported.
TOP = 0.01
NO_GRADIENT = "no gradient reaches its output: the loss does not depend on it"
_TENSOR = "guide"


@dataclass(frozen=True)
class Guide(Pass):
    """One gradient pass of the float model (GuidedQuant, arXiv 2505.07004): solvers that are guided then weigh tokens by it.

    Attributes:
        groups: consecutive parts of a layer's outputs, each with a weight of its own a token.
        labels: `text`: each token's next one; `sampled`: drawn from the model's own distribution, whose Fisher information
            is the second order of KL(float ‖ quantized). Models without logits have neither: noise takes their place.
        select: which sites.
        seed: of labels that are drawn, and of noise.
    """

    name: ClassVar[str] = "guide"
    stage: ClassVar[str] = "observe"
    required: ClassVar[bool] = True

    groups: int = 4
    labels: Labels = "text"
    select: Select = Select()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}, expected at least 1")

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        sites = [site for site in graph.sites if self._takes(site, context, report)]
        if not sites:
            return report
        report.matched = len(sites)
        found = self._stored(graph, context, sites)
        if found is None:
            given = output_gradients(graph, context, sites, groups=self.groups, labels=self.labels, seed=self.seed)
            for site, weights in given:
                if weights is None or not bool(weights.any()):
                    report.skipped.append(Skip(site.name, NO_GRADIENT))
                    self._keep(graph, context, site, None)
                    continue
                self._record(site, self._keep(graph, context, site, normalised(weights)), context, report, len(sites))
        else:
            for site in sites:
                if site.name in found:
                    self._record(site, found[site.name], context, report, len(sites))
                else:
                    report.skipped.append(Skip(site.name, NO_GRADIENT))
        if report.skipped:
            named = [skip.node for skip in report.skipped if skip.reason == NO_GRADIENT]
            if named:
                context.reporter.warning(f"{self.name}: {NO_GRADIENT}: {', '.join(named)}")
        return report

    def _takes(self, site: Site, context: Context, report: Report) -> bool:
        reason = None
        if site.kind == "embedding":
            return False
        if site.kind != "linear":
            reason = "its tokens are shared out among experts; guides are of linear layers"
        elif site.name not in context.schemes:
            reason = context.left_in_float.get(site.name, "no format")
        elif not self.select.matches(site.name, site.role, site.size):
            reason = "not selected"
        if reason is not None:
            report.skipped.append(Skip(site.name, reason))
        return reason is None

    def _record(self, site: Site, guide: torch.Tensor, context: Context, report: Report, of: int) -> None:
        context.guides[site.name] = guide
        share, dead = top_share(guide), float((guide == 0).all(dim=1).double().mean())
        report.layers[site.name] = {"guide_top_share": share, "guide_dead_tokens": dead}
        report.changed += 1
        text = f"{share:.1%} of the loss weight in {TOP:.0%} of {len(guide)} tokens"
        context.reporter.layer(report.changed, of, site.name, text)

    def _key(self, graph: Graph, context: Context, site: Site) -> str:
        assert context.store is not None
        return context.store.key(graph, context, self, site.name)

    def _keep(self, graph: Graph, context: Context, site: Site, guide: torch.Tensor | None) -> torch.Tensor:
        """The guide mapped from a file where there is a folder; with a store, one that a resumed run finds."""
        held = {_TENSOR: torch.empty(0) if guide is None else guide}
        if context.store is not None:
            record: dict[str, Any] = {"gradient": guide is not None}
            return context.store.put(self._key(graph, context, site), held, record)[_TENSOR]
        return kept(held, context.scratch, f"{site.name}.{self.name}")[_TENSOR]

    def _stored(self, graph: Graph, context: Context, sites: list[Site]) -> dict[str, torch.Tensor] | None:
        """What an interrupted run had measured; None unless it is all there."""
        if context.store is None:
            return None
        guides = {}
        for site in sites:
            found = context.store.get(self._key(graph, context, site))
            if found is None:
                return None
            tensors, record = found
            if record["gradient"]:
                guides[site.name] = tensors[_TENSOR]
        return guides


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Weights of mean 1 a group, float32 `[tokens, g]`; a group that the loss does not depend on gets 1 everywhere."""
    mean = weights.double().mean(dim=0)
    dead = mean == 0
    return torch.where(dead, torch.ones_like(mean), weights.double() / torch.where(dead, torch.ones_like(mean), mean)).float()


def top_share(guide: torch.Tensor) -> float:
    """Share of the weight that the heaviest `TOP` of the tokens have, at least one token; `TOP` where all weigh the same."""
    total = guide.double().sum(dim=1)
    count = max(1, round(TOP * len(total)))
    return float(total.topk(count).values.sum() / total.sum())
