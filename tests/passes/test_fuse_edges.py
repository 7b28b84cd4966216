"""Gates, residual sums and norms become part of the linear op beside them, where nothing else reads the values between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qcompiler
from qcompiler.graph.constants import attribute
from qcompiler.graph.graph import Graph
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.passes.rewrite.fuse_edges import FuseEdges
from qcompiler.passes.rewrite.fuse_linears import FuseLinears
from qcompiler.passes.rewrite.op_nodes import arguments
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.passes import Report
from qcompiler.report.inspect_onnx import inspect_onnx
from qcompiler.runtime.session import Session
from tests.calibrated import calibrated

WIDTH = 96
EXACT = 2e-6  # relative to the largest output: the same arithmetic in float32, sums in another order
FLOAT = {"bits": 4, "group": 32}  # activations in float: rounded ones may fall to the other side of an edge


class Norm(nn.Module):
    """x · rsqrt(mean(x²) + ε) · g, with g or 1 + g."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(WIDTH)), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return scaled * (self.offset + self.weight) if self.offset else self.weight * scaled


class Block(nn.Module):
    """A layer as language models have it, without the attention."""

    def __init__(
        self, act: Callable[[torch.Tensor], torch.Tensor] = F.silu, hidden: int = 64, turned: bool = False, offset: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Norm(offset), Norm(offset)
        self.q, self.k, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH)
        self.act, self.turned = act, turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + self.o(torch.sigmoid(self.q(y)) * self.k(y))
        y = self.second(x)
        gate, up = self.gate(y), self.up(y)
        return self.down(gate * self.act(up) if self.turned else self.act(gate) * up) + x


def rows(count: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def fused(model: nn.Module, linear: dict[str, Any] = FLOAT) -> tuple[Graph, Report, torch.Tensor]:
    """The graph with both fusions, the report of the second, what the graph gave before it."""
    graph, context = calibrated(linear, model.eval(), [rows()])
    RoundToNearest().run(graph, context)
    QuantizeSites().run(graph, context)
    FuseLinears().run(graph, context)
    before = run(graph)
    report = FuseEdges().run(graph, context)
    verify(graph, "rewritten")
    return graph, report, before


def run(graph: Graph) -> torch.Tensor:
    (name,) = (str(node.target) for node in graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        (y,) = torch.utils._pytree.tree_leaves(graph.module(**{name: rows()}))
    return y


def assert_same(graph: Graph, expected: torch.Tensor) -> None:
    assert (run(graph) - expected).abs().max() <= EXACT * expected.abs().max()


def reasons(report: Report) -> dict[str, str]:
    return {skip.node: skip.reason for skip in report.skipped}


@pytest.mark.parametrize("linear", [FLOAT, {"bits": 8, "symmetric": False}, {"vq": "vq2"}], ids=["int4", "int8", "vq2"])
def test_a_layer_is_its_products(linear: dict[str, Any]) -> None:
    graph, report, expected = fused(Block(), linear)
    assert_same(graph, expected)
    assert reasons(report) == {"q+k": "its halves do not meet in act(first) · second"}  # a sigmoid is no activation of the op
    assert report.changed == report.matched == 5
    assert {name: report.notes[name] for name in ("gates", "residuals", "norms")} == {"gates": 1, "residuals": 2, "norms": 2}
    assert {name: layer["edges"] for name, layer in report.layers.items()} == {
        "q": ["norm"], "k": ["norm"], "o": ["residual"], "gate": ["norm", "silu"], "up": ["norm", "silu"], "down": ["residual"],
    }  # fmt: skip
    calls = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    op = "linear_vq.default" if "vq" in linear else "linear_nbit.default"
    assert calls == [op, "split_with_sizes.default", "getitem", "getitem", "sigmoid.default", "mul.Tensor", op, op, op]


def test_the_graph_after_it() -> None:
    graph, _, _ = fused(Block())
    lines = [line for line in graph_text(graph.module).splitlines() if "linear_nbit(" in line]
    assert lines == [
        "linear_nbit: float32[s0, 192] = qcompiler.linear_nbit(x, q+k.codes, q+k.scales, None, q+k.bias, None, None, None, None, "
        "first.weight, 4, 32, 192, 96, 0, 1, 0, 1e-05)",
        "o/linear_nbit: float32[s0, 96] = qcompiler.linear_nbit(mul, o.codes, o.scales, None, None, None, None, None, x, None, "
        "4, 32, 96, 96, 0, 1, 0, 0.0)",
        "linear_nbit_1: float32[s0, 64] = qcompiler.linear_nbit(o/linear_nbit, gate+up.codes, gate+up.scales, None, None, None, "
        "None, None, None, second.weight, 4, 32, 128, 96, 0, 1, 1, 1e-05)",
        "down/linear_nbit: float32[s0, 96] = qcompiler.linear_nbit(linear_nbit_1, down.codes, down.scales, None, down.bias, "
        "None, None, None, o/linear_nbit, None, 4, 32, 96, 64, 0, 1, 0, 0.0)",
    ]


GELUS = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", GELUS)
def test_gelu_of_both_kinds(name: str) -> None:
    graph, report, expected = fused(Block(GELUS[name]))
    assert_same(graph, expected)
    assert report.layers["gate"]["edges"] == ["norm", name]


NOT_GATED = {
    "turned": (Block(turned=True), "the activation is of its second half"),
    "other": (Block(torch.tanh), "its halves do not meet in act(first) · second"),
}


@pytest.mark.parametrize("name", NOT_GATED)
def test_halves_that_meet_in_another_way_are_named(name: str) -> None:
    model, words = NOT_GATED[name]
    graph, report, expected = fused(model)
    assert_same(graph, expected)
    assert reasons(report)["gate+up"] == words and report.layers["up"]["edges"] == ["norm"]


def test_keys_and_values_are_no_gate() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.k(x).softmax(-1) + self.v(x)

    graph, report, expected = fused(Pair())
    assert torch.equal(run(graph), expected) and (report.matched, report.skipped) == (0, [])


def test_a_product_that_is_one_already_and_whose_half_ends_within_a_tile() -> None:
    class Both(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.both = nn.Linear(WIDTH, 2 * hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, dim=-1)
            return up * F.silu(gate)

    graph, report, expected = fused(Both(48))
    assert_same(graph, expected)
    assert report.layers == {"both": {"edges": ["silu"]}}
    graph, report, expected = fused(Both(40))
    assert_same(graph, expected)
    assert reasons(report) == {"both": "a half of 80 rows is no multiple of 16"}


def test_a_weight_that_the_graph_computes_becomes_a_constant() -> None:
    graph, report, expected = fused(Block(offset=1.0))
    assert_same(graph, expected)
    assert report.notes["norms"] == 2
    held = arguments(graph.site("q").node)["norm"]
    assert torch.equal(attribute(graph.module, held.target), 1 + Block(offset=1.0).first.weight.detach())
    assert not any(node.op == "get_attr" and node.target == "first.weight" for node in graph.nodes)


def test_what_else_reads_a_value_keeps_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a, self.b, self.c = Norm(), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            a = self.a(y)
            wide = self.b(torch.tanh(a)) + x[:1]  # one row for all
            return self.c(wide) + a + torch.sigmoid(a) + y

    graph, report, expected = fused(Shared())
    assert_same(graph, expected)
    found = reasons(report)
    assert found.pop("b") == "the sum is with a value of another shape"
    assert found == {"aten.mul.Tensor in norm": "read by aten.add.Tensor as well"}
    assert report.layers == {"c": {"edges": ["residual"]}}


def test_a_norm_without_a_weight_stays() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    graph, report, expected = fused(Plain())
    assert torch.equal(run(graph), expected) and list(reasons(report).values()) == ["a norm without a weight"]


@pytest.mark.filterwarnings("ignore:running without the op library")  # said once a process
def test_an_artifact_runs_with_and_without_the_library(tmp_path: Path) -> None:
    model, recipe = Block().eval(), {"name": "r", "linear": FLOAT}
    results = [
        qcompiler.compile(model, output=tmp_path / str(fuse), example=(rows(40),), recipe=recipe | {"fuse": fuse})
        for fuse in (True, False)
    ]
    outputs = []
    for result, portable in ((results[0], False), (results[0], True), (results[1], False)):
        session = Session(result.path, threads=1, portable=portable)
        (port,), (output,) = session.artifact.inputs, session.artifact.outputs
        outputs.append(session.run(**{port.name: rows().numpy()})[output.name])
    for found in outputs[:2]:
        assert np.abs(found - outputs[2]).max() <= 1e-5 * np.abs(outputs[2]).max()
    edges = {record["name"]: record.get("edges") for record in results[0].layers["layers"]}
    assert edges["gate"] == ["norm", "silu"] and edges["down"] == ["residual"]
    nodes = inspect_onnx(results[0].path / "model.onnx").data["nodes"]
    assert [node["edges"] for node in nodes] == [["norm"], ["residual"], ["norm", "silu"], ["residual"]]
