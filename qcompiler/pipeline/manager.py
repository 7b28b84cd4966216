"""Runs passes in order, checks what they promise, and records what they did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.errors import GateError
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import Stage, verify
from qcompiler.pipeline.instruments import Instrument, PeakMemory, Timer
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.pipeline.selection import check_selector
from qcompiler.pipeline.trace import Trace
from qcompiler.sweep.place import STAGES, working_on

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context

# The verifier's stage that holds once passes of this stage are done.
_HOLDS_AFTER: dict[str, Stage] = {
    "normalise": "normalised",
    "analyse": "analysed",
    "transform": "analysed",
    "observe": "analysed",
    "solve": "analysed",
    "rewrite": "rewritten",
}


class PassManager:
    """Applies passes to a graph and keeps the trace.

    Args:
        trace: receives a record a pass.
        verify_each: verify after every pass, not only where a stage ends (tests).
        instruments: what watches every pass; by default its time and its peak memory.
    """

    def __init__(self, trace: Trace, verify_each: bool = False, instruments: Sequence[Instrument] | None = None):
        self.trace = trace
        self.verify_each = verify_each
        self.instruments = (PeakMemory(), Timer()) if instruments is None else instruments

    def capture(self, graph: Graph, report: Report | None = None, context: Context | None = None) -> None:
        """Record the graph as captured; `report` says what capture had to decide.

        Raises `GateError` where it fell back more often than the recipe of `context` allows.
        """
        report = report or Report()
        count = len(graph.module.graph.nodes)
        with self.watched(graph) as timing:
            text = graph_text(graph.module)
        self.trace.add(None, report, text, (count, count), timing)
        if context is not None:
            self._check_fallbacks("capture", report, context)

    @contextlib.contextmanager
    def watched(self, graph: Graph) -> Iterator[dict[str, Any]]:
        """Run the block under every instrument; what they found is in the mapping when it ends."""
        found: dict[str, Any] = {}
        for instrument in self.instruments:
            instrument.before(graph)
        yield found
        for instrument in reversed(self.instruments):
            found |= instrument.after(graph)

    def run(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:
        """Run `passes` in order.

        Raises:
            UsageError: a pass selects layers that are not there.
            GateError: a required pass matched nothing, too many fallbacks, or the verifier refused the result.
        """
        for position, step in enumerate(passes):
            context.reporter.stage(step.name)
            if (select := getattr(step, "select", None)) is not None:
                check_selector(step.name, select, graph, context)
            before = len(graph.module.graph.nodes)
            place = working_on(context.device) if step.stage in STAGES else contextlib.nullcontext()
            with self.watched(graph) as timing, place:
                report = step.run(graph, context)
            nodes = (before, len(graph.module.graph.nodes))
            self.trace.add(step, report, graph_text(graph.module), nodes, timing)
            self._check(step, report, context)
            ends_stage = position + 1 == len(passes) or passes[position + 1].stage != step.stage
            if ends_stage:
                verify(graph, _HOLDS_AFTER[step.stage])
            elif self.verify_each:
                graph.module.graph.lint()

    def _check(self, step: Pass, report: Report, context: Context) -> None:
        allow = context.recipe.allow
        if step.required and not report.matched and step.name not in allow.unmatched:
            near = "".join(f"\n  {skip.node}: {skip.reason}" for skip in report.skipped[:8])
            misses = f" Nearest misses:{near}" if near else ""
            raise GateError(
                f"pass {step.name} matched nothing.{misses}\nAllow it with the recipe's allow: {{unmatched: [{step.name}]}}"
            )
        self._check_fallbacks(f"pass {step.name}", report, context)

    def _check_fallbacks(self, what: str, report: Report, context: Context) -> None:
        fallbacks, allowed = sum(len(entry.record["fallbacks"]) for entry in self.trace.entries), context.recipe.allow.fallbacks
        if fallbacks > allowed:
            listed = "".join(f"\n  {skip.node}: {skip.reason}" for skip in report.fallbacks[:8])
            raise GateError(
                f"{what}: {fallbacks} fallbacks, {allowed} allowed:{listed}\n"
                f"Allow them with the recipe's allow: {{fallbacks: {fallbacks}}}"
            )
