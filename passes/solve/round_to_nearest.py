"""Round every weight to the nearest code of its format: the baseline of all methods, and often enough.

W  ─▶  (q, S[, Z]),  W ≈ S · (q − Z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qcompiler.errors import InputError
from qcompiler.numerics import affine
from qcompiler.pipeline.passes import Pass, Report

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Solve every site that has a format and no solution yet.

    Attributes:
        clipping: `mse` (the range of each group that makes the squared error least) or `minmax`.
        norm: exponent of the search; 2 is the squared error.
    """

    name: ClassVar[str] = "round_to_nearest"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    clipping: Literal["mse", "minmax"] = "mse"
    norm: float = 2.0

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        todo = [s for s in graph.sites if s.name in context.schemes and s.name not in context.solutions]
        report.matched = len(todo)
        by_storage: dict[int, str] = {}
        for index, site in enumerate(todo):
            context.reporter.layer(index + 1, len(todo), site.name, context.schemes[site.name].weight_format.label)
            if site.tie_group is not None and site.tie_group in by_storage:
                solution = context.solutions[by_storage[site.tie_group]]  # one storage, one packed tensor
            else:
                weight = graph.constant(site.weight).detach()
                try:
                    scheme = context.schemes[site.name]
                    solution = affine.fit(weight, scheme.weight_format, self.clipping, self.norm, scheme.per_tensor)
                except ValueError as error:
                    raise InputError(f"layer {site.name}: {error}") from error
                report.layers[site.name] = {"weight_sqnr_db": affine.sqnr_db(weight, solution.dequantize())}
            if site.tie_group is not None:
                first = by_storage.setdefault(site.tie_group, site.name)
                report.layers[site.name] = dict(report.layers[first])
            context.solutions[site.name] = solution
            report.layers[site.name] |= {"method": self.name, "clipping": self.clipping}
            report.changed += 1
        return report
