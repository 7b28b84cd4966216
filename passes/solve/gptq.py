"""Choose each weight's codes so that the layer's output, not the weight, keeps its value.

W  ─▶  (q, S[, Z]) that make tr((W − W̃) H (W − W̃)ᵀ) small, H = E[x xᵀ] of the inputs that the quantized model sees
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qcompiler.errors import UsageError
from qcompiler.numerics import affine
from qcompiler.numerics.gptq import GptqOptions, GptqResult, gptq
from qcompiler.numerics.stack import rows_joined, solve_stack
from qcompiler.passes.solve.guided import GuidedMoments, check_guides, fewest_parts, guided_bytes
from qcompiler.passes.solve.moments import Moments, energy, warn_of_few_tokens
from qcompiler.passes.solve.selection import integer_format, unsolved
from qcompiler.passes.solve.weights import quantizable_matrices, quantizable_weight
from qcompiler.passes.solve.workspace import gptq_bytes
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.recipe.schema import Select
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.order import Group
from qcompiler.sweep.place import CPU
from qcompiler.sweep.reducers import ExpertHessians
from qcompiler.sweep.solve import solve_sites
from qcompiler.sweep.sweep import Sweep

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.numerics.affine import AffineWeight
    from qcompiler.pipeline.context import Context

# Matrices of k × k that the solver holds beside the statistics, and of n × k, in float32; elsewhere see workspace.py.
SQUARES, WEIGHTS = 3, 5


@dataclass(frozen=True)
class Gptq(Pass):
    """GPTQ (arXiv 2210.17323) on every selected linear site that has a format and no solution yet, in topological waves.

    Attributes:
        damping, passes, groups, ordering, clipping, importance: see `qcompiler.numerics.gptq.GptqOptions`.
        asymmetric: aim at the float model's outputs on the float model's inputs (GPTAQ, arXiv 2504.02692); a second stream
            of activations then runs beside the quantized one.
        guided: weigh every token by what the end loss cares for it, as the pass `guide` found (GuidedQuant, arXiv
            2505.07004): each group of a layer's rows has its own H. Experts have no guide and are solved with their plain H.
        select: which sites; by default all but the head, which `head: true` adds.
        head: solve the site of role `head` too.
    """

    name: ClassVar[str] = "gptq"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    damping: float = 0.01
    passes: int = 2
    groups: Literal["live", "static"] = "static"
    ordering: Literal["none", "activation", "group_aware"] = "activation"
    clipping: Literal["mse", "minmax"] = "mse"
    importance: Literal["uniform", "activation", "sweep"] = "sweep"
    asymmetric: bool = False
    guided: bool = False
    select: Select = Select()
    head: bool = False

    def __post_init__(self) -> None:
        self.options()  # refuses what does not go together
        if self.guided and self.asymmetric:
            raise ValueError("guided and asymmetric do not go together: the cross statistic knows no weights of tokens")

    def options(self) -> GptqOptions:
        known = {f.name for f in fields(GptqOptions)}
        return GptqOptions(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in known})

    def run(self, graph: Graph, context: Context) -> Report:
        sites, skipped = self._sites(graph, context)
        if not sites:
            return Report(skipped=skipped)
        self._check_groups(sites, context)
        if self.guided:
            check_guides(self.name, sites, context)
            self._check_matrices(sites, context)
        costs = Costs(lambda group: self._statistics_bytes(group, context), lambda group: self._solver_bytes(group, context))
        sweep = Sweep(graph, context, sites, float_stream=self.asymmetric, costs=costs)
        report = solve_sites(self, graph, context, sites, sweep, _Method(self, graph, context))
        report.skipped += skipped
        report.notes["samples"] = len(sweep.samples)
        report.notes["segments"] = len(sweep.stretches)
        warn_of_few_tokens(self.name, sites, context, report)
        return report

    def _sites(self, graph: Graph, context: Context) -> tuple[list[Site], list[Any]]:
        return unsolved(self.name, graph, context, self.select, head=self.head)

    def _check_groups(self, sites: list[Site], context: Context) -> None:
        """What the solver would refuse at its first site, before a sample runs."""
        if self.ordering != "activation" or self.groups != "live":
            return
        for site in sites:
            if 0 < context.schemes[site.name].weight_format.group < site.shape[1]:
                raise UsageError(
                    f"{self.name}: layer {site.name} has groups, and ordering 'activation' with live groups would scatter "
                    "their columns; use groups: static, or ordering: group_aware"
                )

    def _check_matrices(self, sites: list[Site], context: Context) -> None:
        whole = [site.name for site in sites if context.schemes[site.name].per_tensor]
        if whole:
            raise UsageError(
                f"{self.name}: guided solves a layer's rows in groups, and {whole[0]} has one scale for all of them (group: "
                "tensor); give it another group, or leave guided out"
            )

    def _statistics_bytes(self, group: Group, context: Context) -> int:
        if self.guided and group.expert is None:
            return guided_bytes(group, context)
        return (3 if self.asymmetric and group.expert is None else 1) * group.experts * 4 * group.k * group.k

    def _solver_bytes(self, group: Group, context: Context) -> int:
        n = max(site.shape[0] for site in group.sites)
        if context.device != CPU:
            parts = fewest_parts(group, context) if self.guided else 1
            return gptq_bytes(n, group.k, self.asymmetric and group.expert is None, parts)
        return 4 * (SQUARES * group.k * group.k + WEIGHTS * n * group.k)


class _ExpertMoments(ExpertHessians):
    """H of every expert; the float stream's rows may go to other experts, so there is no cross statistic."""

    def update(self, x: torch.Tensor, expert: torch.Tensor, *_: torch.Tensor) -> None:
        super().update(x, expert)


@dataclass(frozen=True)
class _Method:
    step: Gptq
    graph: Graph
    context: Context

    def statistics(self, group: Group) -> Moments | _ExpertMoments:
        if group.expert is not None:
            return _ExpertMoments(group.k, group.experts)
        if self.step.guided:
            return GuidedMoments(group, self.context)
        return Moments(group.k, self.step.asymmetric)

    def solve(self, site: Site, statistics: Any) -> tuple[AffineWeight, dict[str, Any], str | None]:
        if site.kind == "experts":
            return self._solve_experts(site, statistics)
        if self.step.guided:
            return self._solve_guided(site, statistics)
        hessian, cross, drift = statistics.result()
        weight = quantizable_weight(self.graph, self.context, site)
        result = self._solve_matrix(site, weight, hessian, cross)
        whole = energy(weight, hessian) or 1.0
        # Of E‖W̃ x − W x̃‖² the solver knows what depends on W̃; E‖W (x̃ − x)‖² is the rest.
        rest = 0.0 if drift is None else energy(weight, drift)
        numbers: dict[str, Any] = {"weight_sqnr_db": affine.weight_sqnr_db(weight, result.weight)}
        numbers |= {"error_after": max(result.loss_after + rest, 0.0) / whole}
        numbers |= {"damping": result.damping, "tokens": statistics.tokens}
        if result.loss_before is not None:
            numbers["error_before"] = max(result.loss_before + rest, 0.0) / whole
        return result.weight, numbers | ({"dead_columns": result.dead} if result.dead else {}), result.fallback

    def _solve_matrix(self, site: Site, weight: torch.Tensor, hessian: torch.Tensor, cross: Any) -> GptqResult:
        scheme = self.context.schemes[site.name]
        return gptq(
            weight, hessian, integer_format(self.context, site), self.step.options(), cross=cross, per_tensor=scheme.per_tensor
        )

    def _solve_guided(self, site: Site, statistics: Any) -> tuple[AffineWeight, dict[str, Any], str | None]:
        """Each group of rows by its own H, with which its errors are measured too."""
        weight, hessians = quantizable_weight(self.graph, self.context, site), statistics.of(site.name)
        parts = list(zip(weight.tensor_split(len(hessians)), hessians, strict=True))
        results = [self._solve_matrix(site, rows, own, None) for rows, own in parts]
        solution = rows_joined([result.weight for result in results])
        whole = sum(energy(rows, own) for rows, own in parts) or 1.0
        numbers: dict[str, Any] = {"weight_sqnr_db": affine.weight_sqnr_db(weight, solution)}
        numbers |= {"error_after": sum(result.loss_after for result in results) / whole}
        numbers |= {"damping": max(result.damping for result in results), "tokens": statistics.tokens}
        numbers |= {"error_before": sum(result.loss_before or 0.0 for result in results) / whole}
        dead = max(result.dead for result in results)
        reasons = [f"row group {index}: {result.fallback}" for index, result in enumerate(results) if result.fallback]
        return solution, numbers | ({"dead_columns": dead} if dead else {}), "; ".join(reasons) or None

    def _solve_experts(self, site: Site, statistics: Any) -> tuple[AffineWeight, dict[str, Any], str | None]:
        """Each expert on its own rows; one that met none has only dead columns, which are rounded."""
        before = after = whole = damping = 0.0
        reasons: list[str] = []

        def solve(expert: int, weight: torch.Tensor) -> AffineWeight:
            nonlocal before, after, whole, damping
            hessian, tokens = statistics.result(expert), statistics.tokens[expert]
            if not tokens:
                return affine.fit(weight, integer_format(self.context, site))
            result = self._solve_matrix(site, weight, hessian, None)
            before += tokens * (result.loss_before or 0.0)
            after += tokens * result.loss_after
            whole += tokens * energy(weight, hessian)
            damping = max(damping, result.damping)
            if result.fallback:
                reasons.append(f"expert {expert}: {result.fallback}")
            return result.weight

        turn = itertools.count()
        matrices = quantizable_matrices(self.graph, self.context, site)
        solution, sqnr = solve_stack(matrices, lambda weight: solve(next(turn), weight))
        missed = [expert for expert, tokens in enumerate(statistics.tokens) if not tokens]
        if missed:
            self.context.reporter.warning(
                f"{site.name}: no calibration token meets expert {', '.join(map(str, missed))}; rounded to nearest"
            )
        numbers = {"weight_sqnr_db": sqnr, "damping": damping, "tokens": min(statistics.tokens), "experts_missed": missed}
        numbers |= {"error_before": before / (whole or 1.0), "error_after": after / (whole or 1.0)}
        return solution, numbers, "; ".join(reasons) or None
