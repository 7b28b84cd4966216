"""Tune scales, codebooks and gains of the whole quantized model until it gives what the float model gives.

model(tokens; S · (q − Z), S · c · C[index], g)  ─▶  the same with S', c', C', g':  KL(float ‖ quantized) small
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qcompiler.errors import UsageError
from qcompiler.numerics.tuned import Tuned, TunedAffine, TunedVq
from qcompiler.numerics.vq import VqWeight
from qcompiler.passes.analyse.gains import gains
from qcompiler.passes.solve.twins import Twins
from qcompiler.passes.solve.weights import quantizable_weight
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep.place import moved

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context


@dataclass(frozen=True)
class DistillEndToEnd(Pass):
    """End-to-end distillation of solved sites (GPTVQ, arXiv 2402.15319, table 19; EfficientQAT, arXiv 2407.11062, phase 2).

    The loss is KL(float ‖ quantized) of the logits on calibration windows; without logits, the relative squared error of the
    outputs. Adam moves what is stored: fp16 scales, int8 codebooks and their scales (rounding is passed straight through), and
    the gains of norms. The state that was best on windows that no step saw is kept, if it is better than what was there, both
    measured with the real quantized products. Put it behind the solvers: what runs after it sees the tuned gains.

    Attributes:
        steps: of Adam.
        batch: windows a step.
        scale_rate: largest relative step of a scale.
        codebook_rate: largest step of a codebook's entry, in int8 steps; 0 leaves codebooks as they are.
        code_rate: largest step of an affine site's code before it is rounded, in codes (LLM-QAT, arXiv 2305.17888: latent
            weights behind straight-through rounding); 0 leaves codes as they are. Indices into codebooks always stay.
        gain_rate: largest step of a norm's weight, relative to their root mean square; 0 leaves norms as they are.
        warm_up: share of the steps in which rates rise; then they fall to zero along a cosine.
        hold_out: share of the calibration windows that no step sees and that decide.
        checks: how often the held-out windows are looked at on the way.
        select: which sites; by default all but the head.
        head: tune the site of role `head` too, and with it the lookups that share its weight.
        seed: order of the windows.
    """

    name: ClassVar[str] = "distill_end_to_end"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    steps: int = 300
    batch: int = 4
    scale_rate: float = 0.004
    codebook_rate: float = 0.5
    code_rate: float = 0.0
    gain_rate: float = 0.002
    warm_up: float = 0.05
    hold_out: float = 0.125
    checks: int = 6
    select: Select = Select()
    head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("scale_rate", "codebook_rate", "code_rate", "gain_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a step of 0 or more")
        for name, low in (("hold_out", 0), ("warm_up", -1)):
            if not low < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        sites = [site for site in graph.sites if self._takes(site, graph, context, report)]
        report.matched = len(sites)
        if not sites:
            return report
        matrices = {site.name: self._matrix(site, graph, context) for site in sites}
        names = gains(graph) if self.gain_rate else []
        norms = {name: graph.constant(name).to(context.device).clone().requires_grad_() for name in names}
        twins = Twins(graph, context, matrices, norms, self.name)
        held = max(1, round(self.hold_out * len(twins.samples)))
        if held >= len(twins.samples):
            raise UsageError(f"{self.name}: {len(twins.samples)} calibration windows; expected at least 2, one is held out")
        train, judge = range(len(twins.samples) - held), range(len(twins.samples) - held, len(twins.samples))
        before = twins.divergence(judge)
        best_step = self._descend(twins, list(train), list(judge), context)
        after = _try(graph, context, sites, matrices, norms, functools.partial(twins.divergence, judge), before)
        twins.close()
        kept = after < before
        report.notes |= {
            "held_out_before": before, "held_out_after": min(before, after), "measure": twins.measure, "kept": kept,
            "best_step": best_step, "steps": self.steps, "windows": len(train), "held_out_windows": held, "gains": len(norms),
        }  # fmt: skip
        text = f"{twins.measure} of {held} held-out windows {before:.4g} → {after:.4g}"
        if kept:
            context.reporter.note(f"{self.name}: {text}")
            report.changed = len(sites) + len(norms)
        else:
            report.fallbacks.append(Skip("model", f"{text}: no better, everything is left as it was"))
        for site in sites:
            report.layers[site.name] = {"distilled": kept}
        return report

    def _takes(self, site: Site, graph: Graph, context: Context, report: Report) -> bool:
        if site.kind == "embedding" or site.name not in context.solutions:
            return False
        named = self.select.role is not None or self.select.name is not None
        reason = None
        if not self.select.matches(site.name, site.role, site.size):
            reason = "not selected"
        elif site.role == "head" and not (named or self.head):
            reason = "the head; name it to have it tuned"
        elif site.kind == "experts":
            reason = "a matrix for each expert; computed in float while the others are tuned"
        elif site.name in context.outliers:
            reason = "has columns in float beside its product; computed in float while the others are tuned"
        elif any(s.kind != "embedding" for s in _tied(site, graph)):
            reason = "shares its weight with another product"
        if reason is not None:
            report.skipped.append(Skip(site.name, reason))
        return reason is None

    def _matrix(self, site: Site, graph: Graph, context: Context) -> Tuned:
        solution, scheme = moved(context.solutions[site.name], context.device), context.schemes[site.name]
        if isinstance(solution, VqWeight):
            return TunedVq(solution, fixed=self.codebook_rate == 0 or getattr(scheme, "fixed", None) is not None)
        return TunedAffine(solution, quantizable_weight(graph, context, site) if self.code_rate else None)

    def _descend(self, twins: Twins, train: list[int], judge: list[int], context: Context) -> int:
        """Leave the parameters at the best of the states looked at; returns its step, 0 for where they began."""
        parameters = twins.parameters
        optimizer = torch.optim.Adam(self._rates(twins), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share)
        best, best_step = twins.divergence(judge, stored=False), 0
        kept = [p.detach().clone() for p in parameters]
        queue: list[int] = []
        generator = torch.Generator().manual_seed(self.seed)
        looked_at = {round((i + 1) * self.steps / self.checks) for i in range(self.checks)}
        for step in range(1, self.steps + 1):
            while len(queue) < self.batch:
                queue += [train[index] for index in torch.randperm(len(train), generator=generator, device="cpu").tolist()]
            batch, queue = queue[: self.batch], queue[self.batch :]
            optimizer.zero_grad(set_to_none=True)
            twins.backward(batch)
            optimizer.step()
            schedule.step()
            twins.moved()
            if step not in looked_at:
                continue
            now = twins.divergence(judge, stored=False)
            context.reporter.layer(step, self.steps, twins.measure, f"held out {now:.4g}, best {min(now, best):.4g}")
            if now < best:
                best, best_step = now, step
                kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        twins.moved()
        return best_step

    def _rates(self, twins: Twins) -> list[dict[str, Any]]:
        rates = {
            "scales": self.scale_rate, "codes": self.code_rate,
            "codebook_scales": self.scale_rate, "codebooks": self.codebook_rate,
        }  # fmt: skip
        groups = [
            {"params": [p], "lr": rates[kind]} for matrix in twins.matrices.values() for kind, p in matrix.parameters.items()
        ]
        for gain in twins.gains.values():
            size = float(gain.detach().square().mean().sqrt()) or 1.0
            groups.append({"params": [gain], "lr": self.gain_rate * size})
        return groups

    def _share(self, step: int) -> float:
        """Of the largest rate: up along a line, down along a cosine."""
        rising = math.ceil(self.warm_up * self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(self.steps - rising, 1)))


def _tied(site: Site, graph: Graph) -> list[Site]:
    """The other sites of its storage."""
    return [s for s in graph.sites if s is not site and site.tie_group is not None and s.tie_group == site.tie_group]


def _try(
    graph: Graph, context: Context, sites: list[Site], matrices: dict[str, Tuned], norms: dict[str, torch.Tensor], measure: Any,
    before: float,
) -> float:  # fmt: skip
    """Put the tuned solutions and gains in place and measure; what is no better is taken back."""
    tied = {other.name: site.name for site in sites for other in _tied(site, graph) if other.name in context.solutions}
    old = {name: context.solutions[name] for name in (*(site.name for site in sites), *tied)}
    stored = {name: graph.stored(name) for name in norms}
    scalings = {name: graph.scalings[name] for name in norms if name in graph.scalings}
    for site in sites:
        context.solutions[site.name] = matrices[site.name].solution()
    for name, owner in tied.items():
        context.solutions.keep(name, context.solutions[owner])
    for name, gain in norms.items():
        graph.set_constant(name, gain.detach().clone().cpu())
    after = measure()
    if not after < before:
        for name, solution in old.items():
            context.solutions.keep(name, solution)
        for name, tensor in stored.items():
            graph.set_constant(name, tensor)
        graph.scalings |= scalings
    return after
