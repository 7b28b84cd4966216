"""Runs passes in order, checks what they promise, and records what they did."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcompiler.errors import GateError
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.pipeline.passes import Pass, Report
from qcompiler.pipeline.trace import Trace

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context

# The verifier's stage that holds once passes of this stage are done.
_HOLDS_AFTER = {"normalise": "normalised", "analyse": "analysed", "transform": "analysed", "observe": "analysed", "solve": "analysed", "rewrite": "rewritten"}


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PassManager:
    """Applies passes to a graph and keeps the trace.

    Args:
        trace: receives a record a pass.
        verify_each: verify after every pass, not only where a stage ends (tests).
    """

    def __init__(self, trace: Trace, verify_each: bool = False):
        self.trace = trace
        self.verify_each = verify_each

    def capture(self, graph: Graph, timing: dict[str, float]) -> None:
        """Record the graph as captured."""
        count = len(graph.module.graph.nodes)
        self.trace.add(None, Report(), graph_text(graph.module), (count, count), timing)

    def run(self, graph: Graph, context: Context, passes: Sequence[Pass]) -> None:
        """Run `passes` in order.

        Raises:
            GateError: a required pass matched nothing, too many fallbacks, or the verifier refused the result.
        """
        for position, step in enumerate(passes):
            context.reporter.stage(step.name)
            before = len(graph.module.graph.nodes)
            start = time.perf_counter()
            report = step.run(graph, context)
            timing = {"milliseconds": 1000 * (time.perf_counter() - start), "peak_rss_bytes": peak_rss_bytes()}
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
            raise GateError(f"pass {step.name} matched nothing.{misses}\nAllow it with the recipe's allow: {{unmatched: [{step.name}]}}")
        fallbacks = sum(len(entry.record["fallbacks"]) for entry in self.trace.entries)
        if fallbacks > allow.fallbacks:
            listed = "".join(f"\n  {skip.node}: {skip.reason}" for skip in report.fallbacks[:8])
            raise GateError(f"pass {step.name}: {fallbacks} fallbacks, {allow.fallbacks} allowed:{listed}")
