"""Observers: one a value, in the way of the sites that need it and of nobody else, and never at a stage's end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.errors import GateError
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.ops.observe import OBSERVE
from qcompiler.passes.observe.calibrate_ranges import CalibrateRanges
from qcompiler.passes.observe.place_observers import PlaceObservers
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Skip
from qcompiler.pipeline.trace import Trace
from tests.calibrated import WIDTH, batches, calibrated

STATIC = {"bits": 8, "activations": "int8-static"}


def observers(graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is OBSERVE]


def test_one_observer_a_value():
    graph, context = calibrated(STATIC)
    (x,) = batches(1)
    before = graph.module(x=x)
    report = PlaceObservers().run(graph, context)
    assert (report.matched, report.changed, report.skipped) == (7, 4, [])
    by_sites = {
        node.args[1]: sorted(site.name for site in graph.sites if site.node in node.users) for node in observers(graph)
    }
    assert by_sites == {"q": ["k", "q", "v"], "o": ["o"], "gate": ["gate", "up"], "down": ["down"]}
    # the residual goes on past the observer
    gate = next(node for node in observers(graph) if node.args[1] == "gate")
    assert [user.target for user in gate.args[0].users if user is not gate] == [torch.ops.aten.add.Tensor]
    assert torch.equal(graph.module(x=x), before)
    again = PlaceObservers().run(graph, context)
    assert not again.matched and {skip.reason for skip in again.skipped} == {"its input is observed already"}


def test_the_text_shows_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(x).relu())

    graph, context = calibrated(STATIC, Two().eval())
    PlaceObservers().run(graph, context)
    lines = [line for line in graph_text(graph.module).splitlines() if "parameter" not in line]
    assert lines == [
        "x: float32[s0, 96] = placeholder",
        "observe: float32[s0, 96] = qcompiler.observe(x, 'a', 'int8-static')",
        "a/linear: float32[s0, 8] = aten.linear(observe, a.weight, a.bias)",
        "relu: float32[s0, 8] = aten.relu(a/linear)",
        "observe_1: float32[s0, 8] = qcompiler.observe(relu, 'b', 'int8-static')",
        "b/linear: float32[s0, 4] = aten.linear(observe_1, b.weight, b.bias)",
        "output = [b/linear]",
    ]


def test_what_only_reshapes_a_value_hides_it_not():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

        def forward(self, x):
            return self.a(x), self.b(x.unsqueeze(0).clone())

    graph, context = calibrated(STATIC, Reshaping().eval())
    report = PlaceObservers().run(graph, context)
    assert (report.matched, report.changed) == (2, 1)
    (observer,) = observers(graph)
    assert observer.args[0].op == "placeholder" and list(observer.args[0].users) == [observer]


def test_sites_without_static_activations_are_left_alone_with_the_reason():
    overrides = [
        {"select": {"name": "q"}, "scheme": "float"},
        {"select": {"name": "k"}, "scheme": {"bits": 8, "activations": "int8-token"}},
    ]
    graph, context = calibrated(STATIC, overrides=overrides)
    report = PlaceObservers().run(graph, context)
    assert report.skipped == [
        Skip("q", "the recipe keeps it in float"),
        Skip("k", "its activations are int8-token, not int8-static"),
    ]
    assert observers(graph)[0].args[1] == "v" and report.matched == 5
    with pytest.raises(GateError, match="place_observers matched nothing.*\n  q: its activations are int8-token"):
        graph, context = calibrated({"bits": 8, "activations": "int8-token"})
        PassManager(Trace()).run(graph, context, [PlaceObservers()])


def test_an_observer_that_is_left_is_refused_at_every_stage():
    graph, context = calibrated(STATIC)
    PlaceObservers().run(graph, context)
    for stage in ("captured", "normalised", "analysed", "rewritten"):
        with pytest.raises(GateError, match="an observer is left; calibrate_ranges must follow"):
            verify(graph, stage)


def test_the_trace_has_the_graph_with_observers_and_without():
    graph, context = calibrated(STATIC)
    before = graph_text(graph.module)
    trace = Trace()
    PassManager(trace, verify_each=True).run(graph, context, [PlaceObservers(), CalibrateRanges()])
    placed, calibrated_ = trace.entries
    assert placed.text.count("qcompiler.observe") == 4 and placed.record["notes"] == {"observers": 4}
    assert calibrated_.text == before
    assert calibrated_.record["notes"]["removed_observers"] == 4
