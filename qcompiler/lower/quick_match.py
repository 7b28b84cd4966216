"""onnxscript's pattern matcher without a walk over the whole graph for every node that cannot match.

A pattern with several outputs is tried at every node, and each try lists all nodes of the graph by type before it looks
at the one that it was given. That is quadratic: half of the time that fusing twelve layers takes, more of deeper models.
Looking first changes no match.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher


# UPSTREAM microsoft/onnxscript: remove when SimplePatternMatcher.match looks at `node` before it lists the graph
@contextlib.contextmanager
def quick_match() -> Iterator[None]:
    """While this is open, a node whose type is not that of a pattern's first output fails at once."""
    original = SimplePatternMatcher.match

    def match(self: SimplePatternMatcher, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> MatchResult:
        if not self.pattern.has_single_output_node:
            first = self.pattern.output_nodes[0].op_identifier()
            if first is not None and first[1] != node.op_type:
                return MatchResult().fail("The node is of another type than the pattern's first output.")
        return original(self, model, graph, node, **options)

    SimplePatternMatcher.match = match  # type: ignore[method-assign, assignment]  # it hands all options on
    try:
        yield
    finally:
        SimplePatternMatcher.match = original  # type: ignore[method-assign]
