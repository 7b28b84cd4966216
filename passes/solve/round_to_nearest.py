"""Round every weight to the nearest code of its format: the baseline of all methods, and often enough.

W  ─▶  (q, S[, Z]),  W ≈ S · (q − Z)
W  ─▶  (index, C, c, S),  W ≈ S · c · C[index], with codebooks of the weight alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qcompiler.errors import InputError
from qcompiler.numerics import affine
from qcompiler.numerics.stack import solve_stack
from qcompiler.numerics.vq import VqWeight
from qcompiler.passes.solve.weights import fixed_table, quantizable_matrices, quantizable_weight
from qcompiler.passes.solve.workspace import nearest_bytes
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.pipeline.selection import check_selector
from qcompiler.recipe.schema import Select, VqScheme
from qcompiler.sweep.room import check_layers

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep.solutions import Solution


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Solve every site that has a format and no solution yet.

    Attributes:
        clipping: `mse` (the range of each group that makes the squared error least) or `minmax`.
        norm: exponent of the search; 2 is the squared error.
        kind: `embedding` takes lookups alone: first in a recipe, so that what is calibrated behind them sees them rounded.
        tied: false leaves lookups that share their weight with a product to that product's solver.
        iterations: of EM at most, where codebooks are learned.
        select: which sites; by default all.
        seed: of the codebooks' first entries, where a format learns them.
    """

    name: ClassVar[str] = "round_to_nearest"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = False  # passes before it may have solved everything; the rewrite refuses unsolved sites

    clipping: Literal["mse", "minmax"] = "mse"
    norm: float = 2.0
    kind: Literal["all", "embedding"] = "all"
    tied: bool = True
    iterations: int = 30
    select: Select = Select()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ValueError(f"norm is {self.norm}, expected an exponent above 0")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}, expected at least 1")

    def _takes(self, site: Site) -> bool:
        wanted = self.kind == "all" or site.kind == self.kind
        wanted = wanted and (self.tied or site.kind != "embedding" or site.tie_group is None)
        return wanted and self.select.matches(site.name, site.role, site.shape[0] * site.shape[1])

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        check_selector(self.name, self.select, graph, context)
        unsolved = [s for s in graph.sites if s.name in context.schemes and s.name not in context.solutions]
        todo = [s for s in unsolved if self._takes(s)]
        report.matched = len(todo)
        report.skipped = [Skip(s.name, "not selected") for s in unsolved if s not in todo]
        check_layers(context.device, {site.name: self._bytes(site, context) for site in todo}, "rounding")
        # An earlier pass may have solved one of a tied pair.
        solved = [s for s in graph.sites if s.tie_group is not None and s.name in context.solutions]
        by_storage: dict[int, str] = {s.tie_group: s.name for s in solved if s.tie_group is not None}
        for index, site in enumerate(todo):
            context.reporter.layer(index + 1, len(todo), site.name, context.schemes[site.name].weight_format.label)
            if site.tie_group is not None and site.tie_group in by_storage:
                # one storage, one packed tensor
                context.solutions.keep(site.name, context.solutions[by_storage[site.tie_group]])
            else:
                try:
                    solution, sqnr = self._solve(graph, context, site)
                except ValueError as error:
                    raise InputError(f"layer {site.name}: {error}") from error
                report.layers[site.name] = {"weight_sqnr_db": sqnr}
                context.solutions[site.name] = solution
            if site.tie_group is not None:
                first = by_storage.setdefault(site.tie_group, site.name)
                report.layers[site.name] = dict(report.layers.get(first, {}))
            report.layers[site.name] |= {"method": self.name, "clipping": self.clipping}
            report.changed += 1
        return report

    def _bytes(self, site: Site, context: Context) -> int:
        """On a device; the codes of all experts are there together."""
        size = nearest_bytes(*site.shape, context.schemes[site.name].weight_format)
        return size + (site.size if site.experts > 1 else 0)

    def _solve(self, graph: Graph, context: Context, site: Site) -> tuple[Solution, float]:
        """The solution and its SQNR in dB; no weight is held while the next is read."""
        scheme = context.schemes[site.name]
        if isinstance(scheme, VqScheme):
            from qcompiler.numerics.gptvq import vq_nearest

            matrix = quantizable_weight(graph, context, site)
            table, options = fixed_table(scheme), {"seed": self.seed, "iterations": self.iterations}
            found = vq_nearest(matrix, scheme.weight_format, table, **options)
            assert isinstance(found, VqWeight)
            return found, affine.weight_sqnr_db(matrix, found)
        fit = lambda w: affine.fit(w, scheme.weight_format, self.clipping, self.norm, scheme.per_tensor)  # noqa: E731
        if site.kind == "experts":
            return solve_stack(quantizable_matrices(graph, context, site), fit)
        weight = quantizable_weight(graph, context, site)
        solution = fit(weight)
        return solution, affine.weight_sqnr_db(weight, solution)
