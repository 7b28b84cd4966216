"""Measure what the observers mark, and take them out again.

o = observe(x); linear(o, W)  ─▶  linear(x, W), its range (S, Z) known
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from qcompiler.errors import InputError
from qcompiler.numerics.ranges import RangeEstimator, estimator, static_grid
from qcompiler.ops.observe import OBSERVE
from qcompiler.passes.analyse.find_groups import input_value
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep

if TYPE_CHECKING:
    from torch.fx import Node

    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep import Group


@dataclass(frozen=True)
class CalibrateRanges(Pass):
    """Run the calibration samples and give every observed site the range of its input.

    Sites that are solved already run quantized while what follows them is measured, from then on with their own range too;
    run it before the solve passes to measure the float model instead. Columns that stay in float (outliers) do not count.

    Attributes:
        method: `minmax`; `moving_average` (of each sample's smallest and largest value, with `momentum`); `percentile`;
            `mse` (least Σ |x − x̃|^norm); `entropy` (least KL divergence of 128 levels). See `qcompiler.numerics.ranges`.
        symmetric: zero point 0; otherwise an integer one, as ONNX's QuantizeLinear has it.
        percentile: of the values that the range covers.
        momentum: what a new sample counts in the moving average.
        bins: least number of bins of the methods with a histogram; at least 2048.
        norm: exponent of `mse`.
        select: which of the observed sites.
    """

    name: ClassVar[str] = "calibrate_ranges"
    stage: ClassVar[str] = "observe"
    required: ClassVar[bool] = True

    method: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "minmax"
    symmetric: bool = True
    percentile: float = 99.999
    momentum: float = 0.01
    bins: int = 2048
    norm: float = 2.0
    select: Select = Select()

    def __post_init__(self) -> None:
        self._estimator()  # refuses options out of their bounds

    def _estimator(self) -> RangeEstimator:
        return estimator(
            self.method,
            self.symmetric,
            bins=self.bins,
            percentile=self.percentile,
            momentum=self.momentum,
            norm=self.norm,
        )

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        observed = [site for site in graph.sites if site.kind == "linear" and input_value(site).target is OBSERVE]
        chosen: list[Site] = []
        for site in observed:
            if site.name in context.static_ranges:
                report.skipped.append(Skip(site.name, "its range is known already"))
            elif not self.select.matches(site.name, site.role, site.shape[0] * site.shape[1]):
                report.skipped.append(Skip(site.name, "not selected: its observer waits for another calibrate_ranges"))
            else:
                chosen.append(site)
        if not observed:
            report.skipped.append(Skip("graph", "no value is observed; put place_observers before calibrate_ranges"))
        if chosen:
            self._measure(graph, context, chosen, report)
        report.matched = len(chosen)
        report.changed = len(report.layers)
        report.notes |= {"method": self.method, "removed_observers": _remove(graph, context, observed)}
        return report

    def _measure(self, graph: Graph, context: Context, sites: list[Site], report: Report) -> None:
        sweep = Sweep(graph, context, sites)
        report.notes["samples"] = len(sweep.samples)
        for segment in sweep:
            for wave in segment.waves:
                estimators = {group: self._estimator() for group in wave.groups}
                segment.feed({group.node: _tap(reducer, group, context) for group, reducer in estimators.items()})
                for group, reducer in estimators.items():
                    low, high = reducer.range()
                    for site in group.sites:
                        self._record(site, (low, high), context, report)
                        if site.name in context.solutions:
                            segment.refresh(site)  # what is measured behind it sees its input rounded
                        text = f"{low:.4g} … {high:.4g}"
                        context.reporter.layer(len(report.layers), len(sites), site.name, text)

    def _record(self, site: Site, limits: tuple[float, float], context: Context, report: Report) -> None:
        try:
            scale, zero = static_grid(*limits, self.symmetric)
        except ValueError as error:
            raise InputError(f"layer {site.name}: {error}; check the checkpoint and the calibration text") from error
        context.static_ranges[site.name] = (scale, zero)
        report.layers[site.name] = {
            "activation_range": list(limits),
            "activation_scale": scale,
            "activation_zero": zero,
            "activation_method": self.method,
        }


def _tap(reducer: RangeEstimator, group: Group, context: Context) -> Callable[[torch.Tensor], None]:
    """The estimator's `update`, without the columns that every site of the group keeps in float."""
    outliers = [set(context.outliers.get(site.name, torch.empty(0)).tolist()) for site in group.sites]
    left_out = set.intersection(*outliers)
    if not left_out:
        return reducer.update
    kept = torch.tensor([column for column in range(group.k) if column not in left_out])
    return lambda x: reducer.update(x[:, kept.to(x.device)])


def _remove(graph: Graph, context: Context, observed: list[Site]) -> int:
    """Take out the observers whose sites all have their range; returns how many."""
    waiting = {input_value(site) for site in observed if site.name not in context.static_ranges}
    done: dict[Node, None] = {input_value(site): None for site in observed if input_value(site) not in waiting}
    for observer in done:
        observer.replace_all_uses_with(observer.args[0])  # type: ignore[arg-type]
        graph.module.graph.erase_node(observer)
    graph.module.recompile()
    return len(done)
