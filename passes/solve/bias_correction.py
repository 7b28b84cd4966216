"""Take the mean error of every quantized product out through its bias.

W̃·x̃ + b  ─▶  W̃·x̃ + (b + E[W·x − W̃·x̃])     x of the float model, x̃ of the quantized one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.constants import free_name, readers
from qcompiler.graph.edit import get_constant
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the bias of every solved linear site, in topological waves: each sees the corrected sites before it.

    The means are over all calibration tokens (DFQ, arXiv 1906.04721, measured instead of modelled). A site without a bias
    gets one. Within the calibration set a site's squared error falls by the square of its mean error; what else it does is for
    an evaluation to say.

    Attributes:
        select: which sites; by default all but the head, whose results are large and read by nothing.
        head: correct the site of role `head` too.
    """

    name: ClassVar[str] = "bias_correction"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    select: Select = Select()
    head: bool = False

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        sites = [site for site in graph.sites if site.kind != "embedding" and self._takes(site, context, report)]
        report.matched = len(sites)
        if not sites:
            return report
        shifts: dict[str, torch.Tensor] = {}
        for segment in (sweep := Sweep(graph, context, sites, float_stream=True)):
            for wave in segment.waves:
                errors = {site.name: OutputError(site.shape[0]) for site in wave.sites}
                segment.feed({site.node: errors[site.name].update for site in wave.sites})
                for site in wave.sites:
                    shift = errors[site.name].mean().float()
                    # What the sites behind it see; the graph is left alone until the float stream is done.
                    segment.shift(site, shift)
                    shifts[site.name] = shift.cpu()
                    numbers = report.layers[site.name] = errors[site.name].numbers(shift)
                    text = f"error {numbers['output_error_before']:.3g} → {numbers['output_error_after']:.3g}"
                    context.reporter.layer(len(shifts), len(sites), site.name, text)
        for site in sites:
            add_to_bias(graph, site, shifts[site.name])
        graph.module.recompile()
        report.changed = len(shifts)
        report.notes["samples"] = len(sweep.samples)
        return report

    def _takes(self, site: Site, context: Context, report: Report) -> bool:
        bias = (*site.node.args, None)[2]
        if site.name not in context.solutions:
            reason = context.left_in_float.get(site.name, "not solved; put bias_correction after the solve passes")
        elif site.kind != "linear":
            reason = f"a site of kind {site.kind} has a bias for each of its matrices"
        elif not self.select.matches(site.name, site.role, site.shape[0] * site.shape[1]):
            reason = "not selected"
        elif site.role == "head" and not self.head and self.select.role is None and self.select.name is None:
            reason = "the head; bias_correction: {head: true} takes it"
        elif isinstance(bias, Node) and bias.op != "get_attr":
            reason = f"its bias {bias.name} is computed, no constant"
        else:
            return True
        report.skipped.append(Skip(site.name, reason))
        return False


class OutputError:
    """Mean and squared size of the difference between two streams' results, a tap of a sweep with a float stream.

    Args:
        n: outputs.
    """

    def __init__(self, n: int):
        self._sum = torch.zeros(n, dtype=torch.float64)
        self._squares = self._signal = 0.0
        self.tokens = 0

    def update(self, y: torch.Tensor, y_float: torch.Tensor) -> None:
        """Take the results `[tokens, n]` of the quantized and of the float stream."""
        error = y_float - y
        self._sum += error.sum(dim=0, dtype=torch.float64)
        self._squares += error.square().sum(dtype=torch.float64).item()
        self._signal += y_float.square().sum(dtype=torch.float64).item()
        self.tokens += y.shape[0]

    def mean(self) -> torch.Tensor:
        """E[y_float − y], float64 `[n]`."""
        return self._sum / max(self.tokens, 1)

    def numbers(self, shift: torch.Tensor) -> dict[str, Any]:
        """Root mean square over outputs of the mean error, and the squared error beside the squared result, before and after
        `shift` is added to y."""
        mean, tokens = self.mean(), max(self.tokens, 1)
        left = mean - shift.double()
        after = self._squares + tokens * float(left.square().sum() - mean.square().sum())
        return {
            "mean_error_before": float(mean.square().mean().sqrt()),
            "mean_error_after": float(left.square().mean().sqrt()),
            "output_error_before": self._squares / (self._signal or 1.0),
            "output_error_after": max(after, 0.0) / (self._signal or 1.0),
        }


def add_to_bias(graph: Graph, site: Site, shift: torch.Tensor) -> None:
    """Add `shift` `[n]` to the bias of a linear site; one is made where there is none, or where others read the same."""
    node = site.node
    old = (*node.args, None)[2]
    value, name = shift, None
    if isinstance(old, Node):
        bias = graph.constant(str(old.target))
        value = (bias + shift.to(bias.device).reshape(bias.shape)).clone()
        name = str(old.target) if len(readers(graph.module, str(old.target))) == 1 else None
    name = name or free_name(graph.module, f"{site.name}.bias")
    graph.set_constant(name, value)
    with graph.module.graph.inserting_before(node):
        constant = get_constant(graph.module, name, node)
    node.args = (*node.args[:2], constant)
    if isinstance(old, Node) and not old.users:
        graph.module.graph.erase_node(old)
    site.bias = name
