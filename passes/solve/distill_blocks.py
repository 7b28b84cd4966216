"""Tune the quantized weights of one block after another until the block gives what its float twin gives.

block(h; S·(q − Z))  ─▶  block(h; S'·(q' − Z)),  ‖block(h; W) − block(h; S'·(q' − Z))‖² small on what the quantized prefix gives
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qcompiler.errors import UsageError
from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.straight_through import FakeLinear
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import Activation
from qcompiler.passes.solve.weights import quantizable_weight
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import Select
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.order import Order, good_cuts
from qcompiler.sweep.place import moved
from qcompiler.sweep.sweep import Segment, Sweep
from qcompiler.sweep.values import Values

if TYPE_CHECKING:
    from torch.fx import Node

    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context

# A block ends where no more than this is alive, compared with the cuts beside it: the residual stream.
NARROW = 1.05
# Float copies of a weight while it is tuned: latent, gradient, Adam's two moments, its fake-quantized value.
COPIES = 6


@dataclass(frozen=True)
class DistillBlocks(Pass):
    """Layer-by-layer knowledge distillation (ZeroQuant, arXiv 2206.01861, section 3.3) of sites that are solved already.

    A block lies between two places where only the residual stream is alive. Latent weights and scales are tuned by Adam
    with straight-through rounding of weights and activations; the teacher is the same block in float on the same input.
    What a block ends with is kept only if it is better on the held-out samples, measured with the real quantized products.

    Attributes:
        steps: of Adam a block, one sample each.
        rate: step of a latent weight, in units of its scale; falls to zero along a cosine.
        scale_rate: relative step of a scale.
        hold_out: share of the calibration samples that no step sees and that decide.
        join: narrow stretches to a block; 2 are an attention and its feed-forward.
        select: which sites.
        seed: order of the samples.
    """

    name: ClassVar[str] = "distill_blocks"
    stage: ClassVar[str] = "solve"
    required: ClassVar[bool] = True

    steps: int = 200
    rate: float = 0.02
    scale_rate: float = 0.001
    hold_out: float = 0.125
    join: int = 2
    select: Select = Select()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "join"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("rate", "scale_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a step of 0 or more")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold_out is {self.hold_out}, expected a share between 0 and 1")

    def run(self, graph: Graph, context: Context) -> Report:
        sites = [s for s in graph.sites if s.kind == "linear" and s.name in context.solutions and self._takes(s)]
        why = "; computed in float while its block is tuned"
        reasons = {s.name: f"has columns in float beside its product{why}" for s in sites if s.name in context.outliers}
        reasons |= {s.name: f"has codebooks{why}" for s in sites if isinstance(context.solutions[s.name], VqWeight)}
        sites = [s for s in sites if s.name not in reasons]
        report = Report(matched=len(sites))
        report.skipped = [Skip(name, reason) for name, reason in reasons.items()]
        if not sites:
            return report
        costs = Costs(segment=lambda site: 4 * COPIES * site.shape[0] * site.shape[1])
        sweep = Sweep(graph, context, sites, costs=costs, cuts=self._cuts)
        held = max(1, round(self.hold_out * len(sweep.samples)))
        if held >= len(sweep.samples):
            raise UsageError(f"{self.name}: {len(sweep.samples)} calibration samples; expected at least 2, one is held out")
        blocks: list[dict[str, float]] = []
        for index, segment in enumerate(sweep):
            chosen = [site for wave in segment.waves for site in wave.sites]
            tuned = _Block(self, graph, context, segment, chosen, held).tune()
            blocks.append(tuned)
            for site in chosen:
                report.layers[site.name] = {"block": index, "distilled": tuned["kept"] > 0}
            kept = "kept" if tuned["kept"] else "no better, dropped"
            text = f"block {index}  held-out error {tuned['before']:.4g} → {tuned['after']:.4g}  {kept}"
            context.reporter.solved(index + 1, len(sweep.stretches), chosen[0].name, text)
            if tuned["kept"]:
                report.changed += len(chosen)
            else:
                report.skipped.append(Skip(chosen[0].name, f"block {index}: the held-out error did not fall; left as it was"))
        report.notes["blocks"] = blocks
        return report

    def _takes(self, site: Site) -> bool:
        named = self.select.role is not None or self.select.name is not None
        return self.select.matches(site.name, site.role, site.shape[0] * site.shape[1]) and (named or site.role != "head")

    def _cuts(self, order: Order) -> list[int]:
        return good_cuts(order, NARROW)[self.join - 1 :: self.join]


class _Block:
    def __init__(
        self, step: DistillBlocks, graph: Graph, context: Context, segment: Segment, sites: list[Site], held: int
    ):
        self.step, self.graph, self.context, self.segment, self.sites = step, graph, context, segment, sites
        self.train = list(range(segment.samples - held))
        self.held = list(range(segment.samples - held, segment.samples))
        self.wanted = [node for node in segment.outputs if _floating(node)]
        # Of every sample; beyond a budget in a file, like everything that is kept of all samples.
        self.teacher = Values(self.wanted, context.scratch if context.memory is not None else None)
        for sample in range(segment.samples):
            self.teacher.append(segment.run(sample, self.wanted, {}))

    def tune(self) -> dict[str, float]:
        """Tune, keep what is better; `before` and `after` are held-out errors relative to the block's output."""
        before = self._error()
        old = {site.name: self.context.solutions[site.name] for site in self.sites}
        students = {site.node: self._student(site) for site in self.sites}
        self._descend(students)
        for site in self.sites:
            self.segment.place(site, students[site.node].solution())
        after = self._error()
        if not after < before:
            for site in self.sites:
                self.segment.place(site, old[site.name])
        self.teacher.close()
        return {"before": before, "after": min(after, before), "kept": float(after < before)}

    def _student(self, site: Site) -> FakeLinear:
        weight = quantizable_weight(self.graph, self.context, site)
        scheme = self.context.schemes[site.name]
        static = self.context.static_ranges.get(site.name)
        activation = scheme.activation
        if activation is Activation.INT8_STATIC and static is None:
            activation = Activation.FLOAT  # as the sweep computes it until its range is calibrated
        solution = moved(self.context.solutions[site.name], self.context.device)
        assert isinstance(solution, AffineWeight)  # sites with codebooks are left out
        return FakeLinear(weight, solution, activation, static)

    def _descend(self, students: dict[Node, FakeLinear]) -> None:
        step = self.step
        latents = [(s.latent, step.rate * s.step_size()) for s in students.values()]
        groups: list[dict[str, Any]] = [{"params": [p], "lr": rate} for p, rate in latents]
        groups += [{"params": [s.log_scale], "lr": step.scale_rate} for s in students.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, step.steps)
        generator = torch.Generator().manual_seed(step.seed)
        for number in range(step.steps):
            if number % len(self.train) == 0:
                queue = torch.randperm(len(self.train), generator=generator, device="cpu").tolist()
            sample = self.train[queue[number % len(self.train)]]
            values = self.segment.run(sample, self.wanted, dict(students), gradients=True)
            loss = functools.reduce(torch.add, self._distance(values, sample))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()

    def _error(self) -> float:
        total = 0.0
        for sample in self.held:
            values = self.segment.run(sample, self.wanted)
            total += sum(float(d) for d in self._distance(values, sample))
        return total / (len(self.held) * len(self.wanted))

    def _distance(self, values: dict[Node, torch.Tensor], sample: int) -> list[torch.Tensor]:
        """‖y − ỹ‖² / ‖y‖² of every output."""
        twin = moved(self.teacher[sample], self.context.device)
        return [
            (values[node] - y).square().sum() / y.square().sum().clamp(min=1e-20)
            for node, y in twin.items()
        ]


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
