"""Scale up the channels that matter before their weights are rounded.

norm(x)        ─▶ {W₁, W₂ …}          becomes   norm(x) / s       ─▶ {W₁ · diag(s), W₂ · diag(s) …}
v  ─ attention ─▶ Wo                  becomes   v / s  ─ attention ─▶ Wo · diag(s)
up ─ act(gate) · up ─▶ Wdown          becomes   up / s ─ act(gate) · up ─▶ Wdown · diag(s)
fc1 ─ relu     ─▶ W                   becomes   fc1 / s ─ relu    ─▶ W · diag(s)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qcompiler.numerics.scale_search import Found, Reader, search_awq
from qcompiler.passes.analyse.folds import Kind, apply_fold
from qcompiler.passes.transform.fold_statistics import Gathered, choose, gather, most_rows, sample_rows, spread
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.recipe.schema import Select, VqScheme
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.place import CPU
from qcompiler.sweep.reducers import AbsMean, Hessian

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep import Group


# Copies of a weight that a candidate of the search holds, where all of its rows are tried at once.
TRIED = {"minmax": 6, "mse": 9, "output": 9}


class _Moments:
    """mean |x| and H = E[x xᵀ] of a value."""

    def __init__(self, k: int):
        self.magnitude, self._hessian = AbsMean(k), Hessian(k)
        self._mean: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        self.magnitude.update(x)
        self._hessian.update(x)

    def hessian(self) -> torch.Tensor:
        if self._mean is None:
            self._mean = self._hessian.result()
        return self._mean


@dataclass(frozen=True)
class Awq(Pass):
    """AWQ (arXiv 2306.00978): s = mean|x|^t, t searched for each fold.

    The loss is Σ tr(D H Dᵀ) over the weights that read the scaled channels: the expected error of their outputs over all
    calibration tokens, where the authors run a module on cached tokens. t = 0, which is no scaling, is among the
    candidates, so no fold's loss grows. Statistics are those of the float model. Rounding is that of the site's own format;
    activations count as float. Weights too large for a search get a seeded sample of their rows (`WORK` in
    fold_statistics.py). Heads that share a value head share their factors: statistics are averaged over them.

    Attributes:
        steps: ratios are 0, 1/steps, … 1.
        clipping: of the rounding in the search: `minmax` (the authors'); `mse`, as `round_to_nearest` does; `output`, `mse` in
            which a column's error counts E[x²] times. The last two take 30 times as long. Losses are those of this rounding:
            `clip_search`, which rounds for the output, keeps what was gained; ranges of least weight error (`mse`) cut off
            some of the channels that were scaled up.
        folds: kinds of folds to use.
        select: sites to do it for; a fold is used when any of its sites is selected and gets a format.
        seed: of the rows' sample.
    """

    name: ClassVar[str] = "awq"
    stage: ClassVar[str] = "transform"
    required: ClassVar[bool] = True

    steps: int = 20
    clipping: Literal["minmax", "mse", "output"] = "minmax"
    folds: tuple[Kind, ...] = ("norm-linear", "value-output", "up-down", "relu", "linear-linear")
    select: Select = Select()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")

    def run(self, graph: Graph, context: Context) -> Report:
        def refuse(site: Site) -> str | None:
            if site.name not in context.schemes:
                return context.left_in_float.get(site.name, "no format")
            if isinstance(context.schemes[site.name], VqScheme):
                return "vector-quantized: the search rounds to integers"
            return None if self.select.matches(site.name, site.role, site.size) else "not selected"

        with torch.device(CPU):  # what is looked at and changed is the graph, which stays there
            chosen, skipped = choose(graph, context, self.folds, refuse)
        report = Report(matched=len(chosen), skipped=skipped)
        if not chosen:
            return report
        sites = {site.name: site for site in graph.sites}
        results = {}
        costs = Costs(lambda group: 4 * group.k * group.k, lambda group: self._search_bytes(group, context))
        for index, gathered in enumerate(gather(graph, context, chosen, lambda group: _Moments(group.k), costs)):
            fold = gathered.fold
            context.reporter.layer(index + 1, len(chosen), fold.name, fold.kind)
            results[fold] = self._search(graph, context, sites, gathered)
        for fold in chosen:
            with torch.device(CPU):
                apply_fold(graph, fold, results[fold].factors.cpu())
            report.changed += results[fold].exponent != 0
        report.notes["folds"] = [self._record(fold, results[fold]) for fold in chosen]
        return report

    def _search_bytes(self, group: Group, context: Context) -> int:
        counts = [site.shape[0] * site.experts for site in group.sites]
        if context.device != CPU:  # rows are not tried in pieces there
            counts = [most_rows(count, group.k**2) for count in counts]
            return 4 * group.k * (sum(counts) + TRIED[self.clipping] * max(counts) + group.k)
        rows = sum(counts)
        return 4 * group.k * (4 * rows + group.k)

    def _search(self, graph: Graph, context: Context, sites: dict[str, Site], gathered: Gathered) -> Found:
        fold = gathered.fold
        magnitude = spread(fold, {name: held.magnitude.result() for name, held in gathered.distinct()}, "mean")
        readers = []
        for weight in fold.multiplied:
            scheme = context.schemes.get(weight.site or "")
            if weight.site is None or scheme is None or isinstance(scheme, VqScheme):
                continue  # in float nothing is lost, and of codebooks the search knows nothing
            site = sites[weight.site]
            rows, share = sample_rows(graph, site, site.shape[1] ** 2, self.seed)
            rows, channels = rows.to(context.device), weight.channels.to(context.device)
            reader = Reader(rows, channels, scheme.weight_format, scheme.per_tensor, self.clipping, share)
            readers.append((reader, gathered.inputs[weight.site].hessian()))
        return search_awq(readers, magnitude, self.steps)

    @staticmethod
    def _record(fold: Any, found: Found) -> dict[str, Any]:
        gain = 10 * math.log10(found.before / found.after) if found.before > 0 and found.after > 0 else 0.0
        return {
            "fold": fold.name,
            "kind": fold.kind,
            "sites": fold.sites,
            "ratio": found.exponent,
            "scales": [float(found.factors.min()), float(found.factors.max())],
            "error_before": found.before,
            "error_after": found.after,
            "gain_db": gain,
        }
