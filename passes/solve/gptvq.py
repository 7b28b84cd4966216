"""Choose each vector's codebook entry so that the layer's output, not the weight, keeps its value.

W  ─▶  (index, C, c, S) that make tr((W − W̃) H (W − W̃)ᵀ) small, W̃ = S · c · C[index], H = E[x xᵀ] of the inputs that the
       quantized model sees
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qcompiler.numerics import affine
from qcompiler.numerics.gptvq import GptvqOptions, gptvq
from qcompiler.numerics.vq import VqWeight
from qcompiler.passes.solve.guided import GuidedMoments, check_guides, guided_bytes
from qcompiler.passes.solve.moments import Moments, energy, warn_of_few_tokens
from qcompiler.passes.solve.selection import unsolved
from qcompiler.passes.solve.weights import fixed_table, quantizable_weight
from qcompiler.passes.solve.workspace import gptvq_bytes
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.recipe.schema import Select, VqScheme
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.order import Group
from qcompiler.sweep.place import CPU
from qcompiler.sweep.solve import solve_sites
from qcompiler.sweep.sweep import Sweep

if TYPE_CHECKING:
    import torch

    from qcompiler.graph.graph import Graph, Site
    from qcompiler.ops.formats import VqFormat
    from qcompiler.pipeline.context import Context

# Matrices of k × k that the solver holds beside the statistics, and of n × k, in float32; elsewhere see workspace.py.
SQUARES, WEIGHTS = 3, 6


@dataclass(frozen=True)
class Gptvq(Pass):
    """GPTVQ (arXiv 2402.15319) on every selected vector-quantized site without a solution, in topological waves.

    Attributes:
        damping, iterations, seeding, rounds, passes, steps, ordering: see `qcompiler.numerics.gptvq.GptvqOptions`.
        asymmetric: aim at the float model's outputs on the float model's inputs (GPTAQ, arXiv 2504.02692).
        guided: weight every token by what the end loss cares for it, as the pass `guide` found (GuidedQuant,
            arXiv 2505.07004): each group of output rows has its own H.
        select: which sites; by default all but the head.
        head: solve the site of role `head` too.
        seed: of k-means++.
    """

    name: ClassVar[str] = "gptvq"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    damping: float = GptvqOptions.damping
    iterations: int = GptvqOptions.iterations
    seeding: Literal["mahalanobis", "k-means++", "neighbour"] = GptvqOptions.seeding
    rounds: int = GptvqOptions.rounds
    passes: int = GptvqOptions.passes
    steps: int = GptvqOptions.steps
    ordering: Literal["none", "activation"] = GptvqOptions.ordering
    asymmetric: bool = False
    guided: bool = False
    select: Select = Select()
    head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.options()  # refuses what does not go together
        if self.guided and self.asymmetric:
            raise ValueError("guided and asymmetric do not go together: the cross statistic knows no weights of tokens")

    def options(self) -> GptvqOptions:
        known = {f.name for f in fields(GptvqOptions)}
        return GptvqOptions(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in known})

    def run(self, graph: Graph, context: Context) -> Report:
        sites, skipped = unsolved(self.name, graph, context, self.select, head=self.head, codebooks=True)
        if not sites:
            return Report(skipped=skipped)
        if self.guided:
            check_guides(self.name, sites, context)
        costs = Costs(lambda group: self._statistics_bytes(group, context), lambda group: self._solver_bytes(group, context))
        sweep = Sweep(graph, context, sites, float_stream=self.asymmetric, costs=costs)
        report = solve_sites(self, graph, context, sites, sweep, _Method(self, graph, context))
        report.skipped += skipped
        report.notes["samples"] = len(sweep.samples)
        report.notes["segments"] = len(sweep.stretches)
        warn_of_few_tokens(self.name, sites, context, report)
        return report

    def _statistics_bytes(self, group: Group, context: Context) -> int:
        if self.guided:
            return guided_bytes(group, context)
        return (3 if self.asymmetric else 1) * 4 * group.k * group.k

    def _solver_bytes(self, group: Group, context: Context) -> int:
        n = max(site.shape[0] for site in group.sites)
        if context.device != CPU:
            return max(self._device_bytes(site, context) for site in group.sites)
        return 4 * (SQUARES * group.k * group.k + WEIGHTS * n * group.k)

    def _device_bytes(self, site: Site, context: Context) -> int:
        scheme, parts = context.schemes[site.name], 1
        assert isinstance(scheme, VqScheme)
        if self.guided:
            guided = context.guides[site.name].shape[1]
            parts = whole_parts(guided, site.shape[0], scheme.weight_format, scheme.fixed is not None)
        return gptvq_bytes(*site.shape, scheme.weight_format, self.asymmetric, parts)


@dataclass(frozen=True)
class _Method:
    step: Gptvq
    graph: Graph
    context: Context

    def statistics(self, group: Group) -> Moments:
        if self.step.guided:
            return GuidedMoments(group, self.context)
        return Moments(group.k, self.step.asymmetric)

    def solve(self, site: Site, statistics: Any) -> tuple[VqWeight, dict[str, Any], str | None]:
        scheme = self.context.schemes[site.name]
        assert isinstance(scheme, VqScheme)
        hessian, cross, drift = statistics.result()
        weight = quantizable_weight(self.graph, self.context, site)
        rows = None
        if self.step.guided:
            rows = whole_codebooks(statistics.of(site.name), len(weight), scheme.weight_format, scheme.fixed is not None)
        result = gptvq(
            weight, hessian, scheme.weight_format, self.step.options(),
            cross=cross, row_hessians=rows, table=fixed_table(scheme), seed=self.step.seed,
        )  # fmt: skip
        assert isinstance(result.weight, VqWeight)  # of a packed format
        if rows is None:
            whole = energy(weight, hessian)
        else:
            whole = sum(energy(part, own) for part, own in zip(weight.tensor_split(len(rows)), rows, strict=True))
        # Of E‖W̃ x − W x̃‖² the solver knows what depends on W̃; E‖W (x̃ − x)‖² is the rest.
        rest = 0.0 if drift is None else energy(weight, drift)
        numbers: dict[str, Any] = {"weight_sqnr_db": affine.weight_sqnr_db(weight, result.weight)}
        numbers |= {"error_after": max(result.loss_after + rest, 0.0) / (whole or 1.0)}
        numbers |= {"damping": result.damping, "tokens": statistics.tokens}
        numbers |= {} if rows is None else {"guided_parts": len(rows)}
        if result.loss_before is not None:
            numbers["error_before"] = max(result.loss_before + rest, 0.0) / (whole or 1.0)
        return result.weight, numbers | ({"dead_columns": result.dead} if result.dead else {}), result.fallback


def whole_codebooks(hessians: torch.Tensor, n: int, format: VqFormat, fixed: bool) -> torch.Tensor:
    """`[groups, k, k]` of a guide -> `[parts, k, k]`: neighbours are averaged until no codebook belongs to two of n rows' parts.

    Args:
        fixed: the table is not learned, so it belongs to nobody.
    """
    groups, k, _ = hessians.shape
    parts = whole_parts(groups, n, format, fixed)
    return hessians.view(parts, groups // parts, k, k).mean(dim=1)


def whole_parts(groups: int, n: int, format: VqFormat, fixed: bool) -> int:
    """How many parts of n rows, at most `groups`, no codebook belongs to two of."""

    def whole(parts: int) -> bool:
        if n % parts or groups % parts:
            return False
        return parts == 1 or fixed or (format.block_rows > 0 and n // parts % format.block_rows == 0)

    return next(parts for parts in range(groups, 0, -1) if whole(parts))
