"""Move range from activations, where one outlier channel widens everything, into weights, which are flat.

norm(x)  ─▶ {W₁, W₂ …}     becomes     norm(x) / s  ─▶ {W₁ · diag(s), W₂ · diag(s) …}

and likewise through attention (v to o), through a gated block (up to down) and through a relu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qcompiler.numerics.scale_search import Found, Reader, sampled_error, search_smoothing, smoothing_factors
from qcompiler.ops.formats import Activation
from qcompiler.passes.analyse.folds import Fold, Kind, apply_fold
from qcompiler.passes.transform.fold_statistics import Gathered, choose, column_maxima, gather, sample_rows, spread
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.recipe.schema import Select, VqScheme
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.place import CPU
from qcompiler.sweep.reducers import AbsMax, Reservoir

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


class _Tokens:
    """max |x| a channel of a value, and a seeded sample of its tokens."""

    def __init__(self, k: int, size: int, seed: int):
        self.largest, self.tokens = AbsMax(k), Reservoir(k, size, seed)

    def update(self, x: torch.Tensor) -> None:
        self.largest.update(x)
        self.tokens.update(x)


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """SmoothQuant (arXiv 2211.10438): s = max|x|^alpha / max|w|^(1 − alpha) a channel.

    max|x| is over all calibration tokens, max|w| over every row of every weight that reads the channel; both are at least
    1e-5, and so is s; a channel that is zero throughout keeps s = 1. The published recipe smooths what norms feed; here
    every exact fold is used by default, so that the products behind gates and attention are smoothed as well.

    Attributes:
        alpha: share of the range that leaves the activations; or `search`: of 0, 0.05, … 1 and no scaling at all, for each
            fold what makes the error of the quantized products least, on a sample of tokens, activations and weights
            rounded as the site's format says (static ranges as min-max over all tokens).
        folds: kinds of folds to use.
        select: sites to do it for; without conditions, those whose activations are int8.
        tokens: size of the sample that errors are measured on.
        seed: of the samples of tokens and rows.
    """

    name: ClassVar[str] = "smooth_quant"
    stage: ClassVar[str] = "transform"
    required: ClassVar[bool] = True

    alpha: float | Literal["search"] = 0.5
    folds: tuple[Kind, ...] = ("norm-linear", "value-output", "up-down", "relu", "linear-linear")
    select: Select = Select()
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha != "search" and not 0 <= float(self.alpha) <= 1:
            raise ValueError(f"alpha must be in [0, 1], or 'search'; found {self.alpha!r}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, found {self.tokens}")

    def run(self, graph: Graph, context: Context) -> Report:
        def refuse(site: Site) -> str | None:
            scheme = context.schemes.get(site.name)
            if not self.select.matches(site.name, site.role, site.size):
                return "not selected"
            if self.select == Select() and (scheme is None or scheme.activation is Activation.FLOAT):
                return "its activations stay in float; select it to smooth it anyway"
            if isinstance(scheme, VqScheme) and self.alpha == "search":
                return "vector-quantized: the search rounds to integers; give an alpha to smooth it anyway"
            return None

        with torch.device(CPU):  # what is looked at and changed is the graph, which stays there
            chosen, skipped = choose(graph, context, self.folds, refuse)
        report = Report(matched=len(chosen), skipped=skipped)
        if not chosen:
            return report
        sites = {site.name: site for site in graph.sites}
        found = {}
        costs = Costs(lambda group: 4 * self.tokens * group.k)
        make = lambda group: _Tokens(group.k, self.tokens, self.seed)  # noqa: E731
        for index, gathered in enumerate(gather(graph, context, chosen, make, costs)):
            context.reporter.layer(index + 1, len(chosen), gathered.fold.name, gathered.fold.kind)
            found[gathered.fold] = self._factors(graph, context, sites, gathered)
        for fold in chosen:
            with torch.device(CPU):
                apply_fold(graph, fold, found[fold].factors.cpu())
            report.changed += 1
        report.notes["folds"] = [self._record(fold, found[fold]) for fold in chosen]
        return report

    def _factors(self, graph: Graph, context: Context, sites: dict[str, Site], gathered: Gathered) -> Found:
        fold = gathered.fold
        inputs = spread(fold, {name: held.largest.result() for name, held in gathered.distinct()}, "amax")
        weights = spread(fold, {name: column_maxima(graph, sites[name]).to(context.device) for name in fold.sites}, "amax")
        readers = []
        for weight in fold.multiplied:
            scheme = context.schemes.get(weight.site or "")
            if weight.site is None or scheme is None or isinstance(scheme, VqScheme):
                continue
            site = sites[weight.site]
            rows, share = sample_rows(graph, site, site.shape[1] * self.tokens, self.seed)
            rows, channels = rows.to(context.device), weight.channels.to(context.device)
            reader = Reader(rows, channels, scheme.weight_format, scheme.per_tensor, "minmax", share, scheme.activation)
            readers.append((reader, gathered.inputs[weight.site].tokens.result()))
        if self.alpha == "search":
            return search_smoothing(readers, inputs, weights)
        s = smoothing_factors(inputs, weights, float(self.alpha))
        one = torch.ones_like(s)
        return Found(s, float(self.alpha), sampled_error(readers, inputs, one), sampled_error(readers, inputs, s))

    @staticmethod
    def _record(fold: Fold, found: Found) -> dict[str, Any]:
        return {
            "fold": fold.name,
            "kind": fold.kind,
            "sites": fold.sites,
            "alpha": found.exponent,
            "scales": [float(found.factors.min()), float(found.factors.max())],
            "error_before": found.before,
            "error_after": found.after,
        }
