"""Choose each weight's codes so that the layer's output, not the weight, keeps its value.

W  ─▶  (q, S[, Z]) that make tr((W − W̃) H (W − W̃)ᵀ) small, H = E[x xᵀ] of the inputs that the quantized model sees
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.passes.solve.weights import quantizable_weight
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.recipe.schema import Select
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.order import Group
from qcompiler.sweep.reducers import Cross, Hessian
from qcompiler.sweep.solve import solve_sites
from qcompiler.sweep.sweep import Sweep

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.numerics.affine import AffineWeight
    from qcompiler.pipeline.context import Context

# Matrices of k × k that the solver holds beside the statistics, and of n × k, in float32.
SQUARES, WEIGHTS = 3, 5


@dataclass(frozen=True)
class Gptq(Pass):
    """GPTQ (arXiv 2210.17323) on every selected linear site that has a format and no solution yet, in topological waves.

    Attributes:
        damping, groups, ordering, clipping, importance: see `qcompiler.numerics.gptq.GptqOptions`.
        asymmetric: aim at the float model's outputs on the float model's inputs (GPTAQ, arXiv 2504.02692); a second stream
            of activations then runs beside the quantized one.
        select: which sites; by default all but the head, which `head: true` adds.
        head: solve the site of role `head` too.
    """

    name: ClassVar[str] = "gptq"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    damping: float = 0.01
    groups: Literal["live", "static"] = "live"
    ordering: Literal["none", "activation", "group_aware"] = "group_aware"
    clipping: Literal["mse", "minmax"] = "mse"
    importance: Literal["uniform", "activation", "sweep"] = "sweep"
    asymmetric: bool = False
    select: Select = Select()
    head: bool = False

    def __post_init__(self) -> None:
        self.options()  # refuses what does not go together

    def options(self) -> GptqOptions:
        known = {f.name for f in fields(GptqOptions)}
        return GptqOptions(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in known})

    def run(self, graph: Graph, context: Context) -> Report:
        sites, skipped = self._sites(graph, context)
        if not sites:
            return Report(skipped=skipped)
        costs = Costs(self._statistics_bytes, self._solver_bytes)
        sweep = Sweep(graph, context, sites, float_stream=self.asymmetric, costs=costs)
        report = solve_sites(self, graph, context, sites, sweep, _Method(self, graph, context))
        report.skipped += skipped
        report.notes["samples"] = len(sweep.samples)
        report.notes["segments"] = len(sweep.stretches)
        return report

    def _sites(self, graph: Graph, context: Context) -> tuple[list[Site], list[Any]]:
        from qcompiler.passes.solve.selection import unsolved

        return unsolved(self.name, graph, context, self.select, head=self.head)

    def _statistics_bytes(self, group: Group) -> int:
        return (2 if self.asymmetric else 1) * 4 * group.k * group.k

    def _solver_bytes(self, group: Group) -> int:
        n = max(site.shape[0] for site in group.sites)
        return 4 * (SQUARES * group.k * group.k + WEIGHTS * n * group.k)


class _Moments:
    """H of a group, and with a float stream the cross statistic."""

    def __init__(self, k: int, asymmetric: bool):
        self._hessian = Hessian(k)
        self._cross = Cross(k) if asymmetric else None
        self._means: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def update(self, *x: torch.Tensor) -> None:
        self._hessian.update(x[0])
        if self._cross is not None:
            self._cross.update(*x)

    @property
    def tokens(self) -> int:
        return self._hessian.tokens

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._means is None:
            self._means = self._hessian.result(), None if self._cross is None else self._cross.result()
        return self._means


@dataclass(frozen=True)
class _Method:
    step: Gptq
    graph: Graph
    context: Context

    def statistics(self, group: Group) -> _Moments:
        return _Moments(group.k, self.step.asymmetric)

    def solve(self, site: Site, statistics: _Moments) -> tuple[AffineWeight, dict[str, Any], str | None]:
        hessian, cross = statistics.result()
        scheme = self.context.schemes[site.name]
        weight = quantizable_weight(self.graph, self.context, site)
        result = gptq(
            weight, hessian, scheme.weight_format, self.step.options(), cross=cross, per_tensor=scheme.per_tensor
        )
        return result.weight, self._numbers(result, weight, hessian, statistics.tokens), result.fallback

    def _numbers(self, result: Any, weight: torch.Tensor, hessian: torch.Tensor, tokens: int) -> dict[str, Any]:
        from qcompiler.numerics import affine

        whole = float(((weight @ hessian) * weight).sum(dtype=torch.float64)) or 1.0
        numbers = {
            "weight_sqnr_db": affine.sqnr_db(weight, result.weight.dequantize()),
            "error_after": result.loss_after / whole,
            "damping": result.damping,
            "tokens": tokens,
        }
        if result.loss_before is not None:
            numbers["error_before"] = result.loss_before / whole
        return numbers | ({"dead_columns": result.dead} if result.dead else {})
