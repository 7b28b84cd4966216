from __future__ import annotations

import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.passes.normalise.strip_guards import StripGuards

aten = torch.ops.aten


class Checked(nn.Module):
    """Casts to the type it has, drops nothing in evaluation, slices everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.linear(x[:, 0:]).to(torch.float32)).detach()
        return y[:, 1:].to(torch.float64)


def targets(graph) -> list:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_guards_assertions_and_no_ops_go() -> None:
    graph = capture(Checked(), torch.randn(3, 4))
    # As the exporter's callback hands it over, with its guards in the graph.
    with graph.module.graph.inserting_after(next(n for n in graph.nodes if n.op == "placeholder")):
        graph.module.add_module("_guards_fn", nn.Identity())
        graph.module.graph.call_module("_guards_fn")
    x = torch.randn(5, 4)
    expected = graph.module.linear.weight @ x.T
    report = StripGuards().run(graph, None)
    assert targets(graph) == [aten.linear.default, aten.slice.Tensor, aten.to.dtype]
    assert report.notes["guards"] == 1 and report.notes["assertions"] >= 1 and report.notes["handed_on"] >= 4
    assert report.matched == report.changed == sum(report.notes.values())
    assert not hasattr(graph.module, "_guards_fn")
    expected = (expected.T + graph.module.linear.bias)[:, 1:].double()
    torch.testing.assert_close(graph.module(x=x), expected)


def test_a_cast_a_slice_and_a_copy_that_do_something_stay() -> None:
    class Working(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float16)[1:].to(torch.float32, copy=True)[::2]

    graph = capture(Working(), torch.randn(4, 4))
    StripGuards().run(graph, None)
    kept = targets(graph)
    assert kept.count(aten.to.dtype) == 2 and kept.count(aten.slice.Tensor) == 2


def test_nothing_to_strip_is_reported_as_nothing() -> None:
    graph = capture(nn.Linear(4, 4), torch.randn(2, 4))
    report = StripGuards().run(graph, None)
    assert (report.matched, report.changed, report.skipped) == (0, 0, [])
