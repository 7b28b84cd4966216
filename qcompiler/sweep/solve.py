"""Solve sites in waves over a sweep: one report line a site, results stored as they come, stopping where it can be resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qcompiler.artifact.interrupt import sigterm_postponed
from qcompiler.errors import InputError, Stopped
from qcompiler.graph.graph import Graph, Site
from qcompiler.ops.packing import packed_bytes_of
from qcompiler.pipeline.memory import anonymous_bytes
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.sweep.order import Group
from qcompiler.sweep.solutions import Solution, from_tensors, to_tensors
from qcompiler.sweep.sweep import Segment, Sweep

if TYPE_CHECKING:
    from qcompiler.pipeline.context import Context


class Statistics(Protocol):
    """What a method gathers of a group's input."""

    # Any: how many tensors there are follows from `Group.tapped` and the sweep's streams.
    def update(self, *x: Any, **_: Any) -> None:
        """Take what `Segment.feed` gives of a sample for the group: `[tokens, k]`, and for experts the expert of each."""


class Method(Protocol):
    """A way to solve one site from its weight and the statistics of its input."""

    def statistics(self, group: Group) -> Statistics:
        """An empty accumulator for a group."""

    def solve(self, site: Site, statistics: Any) -> tuple[Solution, dict[str, Any], str | None]:
        """The solution; numbers for the record (`error_before`, `error_after` among them); a fallback's reason or None.

        Raises:
            ValueError: the weight or the statistics cannot be used; the layer's name is added.
        """


def solve_sites(step: Pass, graph: Graph, context: Context, sites: Sequence[Site], sweep: Sweep, method: Method) -> Report:
    """Solve every site of `sites` that has no solution yet.

    Sites of one storage are solved once. With `context.store` every solution is a file as soon as it is there, sites that
    the store holds are not solved again, and SIGTERM ends the run behind the site at work.

    Raises:
        Stopped: SIGTERM arrived (exit code 75).
        InputError: a weight or its statistics that no solver can use.
    """
    run = _Run(step, graph, context, sites, method)
    with sigterm_postponed(context.store is not None) as stop:
        for segment in sweep:
            for wave in segment.waves:
                run.wave(segment, wave.groups, stop)
    return run.report


class _Run:
    def __init__(self, step: Pass, graph: Graph, context: Context, sites: Sequence[Site], method: Method):
        self.step, self.graph, self.context, self.method = step, graph, context, method
        self.todo = [site for site in sites if site.name not in context.solutions]
        self.names = {site.name for site in self.todo}
        self.report = Report(matched=len(self.todo))
        self.done = 0

    def wave(self, segment: Segment, groups: Sequence[Group], stop: Any) -> None:
        stored: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        keys = {site.name: self._key(site) for group in groups for site in self._todo(group)}
        for name, key in keys.items():
            found = self.context.store.get(key) if self.context.store is not None and key else None
            if found is not None:
                stored[name] = found
        waiting = [group for group in groups if any(site.name not in stored for site in self._todo(group))]
        gathered = {group: self.method.statistics(group) for group in waiting}
        if gathered:
            segment.feed({group.tapped: statistics.update for group, statistics in gathered.items()})
        for group in groups:
            for site in self._todo(group):
                if site.name in stored:
                    self._restore(segment, site, *stored[site.name])
                else:
                    self._solve(segment, site, gathered[group], keys[site.name])
                if stop.arrived:
                    raise Stopped(
                        f"stopped behind layer {site.name}: {self.done} of {len(self.todo)} layers of {self.step.name} are "
                        "solved and kept; the same command with --resume goes on from there"
                    )
            gathered.pop(group, None)

    def _todo(self, group: Group) -> list[Site]:
        return [site for site in group.sites if site.name in self.names]

    def _key(self, site: Site) -> str:
        store = self.context.store
        return "" if store is None else store.key(self.graph, self.context, self.step, site.name)

    def _restore(self, segment: Segment, site: Site, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        segment.place(site, from_tensors(tensors, record["format"]), mapped=True)
        self._record(site, record["layer"], record["fallback"], "resumed")

    def _solve(self, segment: Segment, site: Site, statistics: Any, key: str) -> None:
        start = time.perf_counter()
        twin = self._tied(site)
        if twin is not None:
            solution, record, fallback = self.context.solutions[twin], dict(self.report.layers.get(twin, {})), None
            segment.place(site, solution, mapped=True)
        else:
            try:
                solution, record, fallback = self.method.solve(site, statistics)
            except ValueError as error:
                raise InputError(f"layer {site.name}: {error}") from error
            if self.context.store is not None:
                whole = {"format": solution.format.label, "layer": record, "fallback": fallback}
                tensors = self.context.store.put(key, to_tensors(solution), whole)
                segment.place(site, from_tensors(tensors, solution.format.label), mapped=True)
            else:
                segment.place(site, solution)
        self._record(site, record, fallback, f"{time.perf_counter() - start:.1f} s")

    def _tied(self, site: Site) -> str | None:
        """A solved site of the same storage."""
        if site.tie_group is None:
            return None
        twins = (s.name for s in self.graph.sites if s.tie_group == site.tie_group and s.name != site.name)
        return next((name for name in twins if name in self.context.solutions), None)

    def _record(self, site: Site, record: dict[str, Any], fallback: str | None, how: str) -> None:
        self.done += 1
        self.report.changed += 1
        self.report.layers[site.name] = {"method": self.step.name, **record}
        if fallback:
            self.report.fallbacks.append(Skip(site.name, fallback))
        format = self.context.schemes[site.name].weight_format
        bits = 8 * sum(packed_bytes_of(*site.shape, format).values()) / math.prod(site.shape)
        before, after = record.get("error_before"), record.get("error_after")
        error = f"error {before:.3g} → {after:.3g}  " if before is not None and after is not None else ""
        memory = f"{anonymous_bytes() / 2**30:.1f} GiB"
        text = f"{format.label}  {bits:.2f} bits  {error}{how}  {memory}"
        self.context.reporter.solved(self.done, len(self.todo), site.name, text)
