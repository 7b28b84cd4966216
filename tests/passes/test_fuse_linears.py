"""Layers that read one value become one op: the same bits, each layer found again in the records, refusals with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.graph.constants import attribute
from qcompiler.graph.graph import Graph
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.ops.spec import SPECS
from qcompiler.passes.rewrite.fusable import runs
from qcompiler.passes.rewrite.fuse_linears import FuseLinears, fused_name
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.context import Context
from qcompiler.pipeline.passes import Report
from qcompiler.runtime.session import Session
from tests.calibrated import calibrated

WIDTH = 96


class Block(nn.Module):
    """q, k and v of unequal sizes read x; gate and up read what comes of them."""

    def __init__(self, q: int = 96, k: int = 32, v: int = 40, hidden: int = 64, bias: str = "qkv") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=name in bias) for name, n in zip("qkv", (q, k, v), strict=True))
        self.o = nn.Linear(q, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.o(self.q(x) * self.k(x).mean(-1, keepdim=True) * self.v(x).sum(-1, keepdim=True))
        return h + self.down(torch.relu(self.gate(h)) * self.up(h))


def rows(count: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def quantized(
    linear: dict[str, Any], model: nn.Module | None = None, x: torch.Tensor | None = None, **recipe: Any
) -> tuple[Graph, Context]:
    graph, context = calibrated(linear, (Block() if model is None else model).eval(), [rows() if x is None else x], **recipe)
    RoundToNearest().run(graph, context)
    for site in graph.sites:
        if linear.get("activations") == "int8-static":
            context.static_ranges[site.name] = (0.02, -3) if site.name not in ("o", "down") else (0.01, 0)
    QuantizeSites().run(graph, context)
    return graph, context


def fuse(graph: Graph, context: Context) -> Report:
    report = FuseLinears().run(graph, context)
    verify(graph, "rewritten")
    return report


def run(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    (name,) = (str(node.target) for node in graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        (y,) = torch.utils._pytree.tree_leaves(graph.module(**{name: x}))
    return y


INT4 = {"bits": 4, "group": 32, "activations": "int8-block128"}
FORMATS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int8-token": {"bits": 8, "activations": "int8-token"},
    "int3-zeros-float": {"bits": 3, "group": 64, "symmetric": False},
    "int2-zeros": {"bits": 2, "group": 32, "symmetric": False, "activations": "int8-block128"},
    "int8-static": {"bits": 8, "activations": "int8-static"},
    "vq2": {"vq": "vq2", "activations": "int8-block128"},
    "vq3": {"vq": "vq3"},
    "nf4": {"vq": "nf4", "activations": "int8-block128"},
}


def reference(graph: Graph, name: str, x: np.ndarray) -> np.ndarray:
    """What the declaration of the op of a site says it computes of x."""
    node = graph.site(name).node
    spec = SPECS[node.target.name().removeprefix("qcompiler::")]
    held = [None if a is None else attribute(graph.module, a.target).detach().numpy() for a in node.args[1 : len(spec.inputs)]]
    inputs = {"x": x, **dict(zip((i.name for i in spec.inputs[1:]), held, strict=True))}
    return spec.reference(inputs, dict(zip(spec.attributes, node.args[len(spec.inputs) :], strict=True)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_are_the_same_bits(name: str) -> None:
    """Of the library, and of the declaration; with a last part that ends within a tile."""
    graph, context = quantized(FORMATS[name], allow={"fallbacks": 9})
    groups = [["q", "k", "v"], ["gate", "up"]]
    samples = [rows(count, seed=count) for count in (1, 3, 40)]
    expected = [run(graph, x) for x in samples]
    apart = [[reference(graph, site, samples[1].numpy()) for site in group] for group in groups]
    report = fuse(graph, context)
    assert (report.matched, report.changed, report.skipped) == (2, 2, [])
    assert all(torch.equal(run(graph, x), y) for x, y in zip(samples, expected, strict=True))
    for group, parts in zip(groups, apart, strict=True):
        assert len({graph.site(site).node for site in group}) == 1
        np.testing.assert_array_equal(reference(graph, group[0], samples[1].numpy()), np.concatenate(parts, axis=-1))


def test_the_graph_after_it() -> None:
    graph, context = quantized(INT4)
    report = fuse(graph, context)
    assert graph_text(graph.module).splitlines()[1:10] == [
        "q+k+v.codes: uint8[11, 12, 64] = buffer",
        "q+k+v.scales: float16[11, 3, 16] = buffer",
        "q+k+v.bias: float32[168] = buffer",
        "linear_nbit: float32[s0, 168] = qcompiler.linear_nbit(x, q+k+v.codes, q+k+v.scales, None, q+k+v.bias, None, None, None, "
        "None, None, 4, 32, 168, 96, 2, 1, 0, 0.0)",
        "split_with_sizes: (float32[s0, 96], float32[s0, 32], float32[s0, 40]) = "
        "aten.split_with_sizes(linear_nbit, [96, 32, 40], -1)",
        "q/getitem: float32[s0, 96] = operator.getitem(split_with_sizes, 0)",
        "k/getitem: float32[s0, 32] = operator.getitem(split_with_sizes, 1)",
        "v/getitem: float32[s0, 40] = operator.getitem(split_with_sizes, 2)",
        "mean: float32[s0, 1] = aten.mean.dim(k/getitem, [-1], True)",
    ]
    held = set(graph.module.state_dict())
    assert {"q+k+v.codes", "gate+up.codes", "o.codes"} <= held and not {"q.codes", "k.scales", "up.codes", "v.bias"} & held
    assert report.layers["q"] == {"packed_as": "q+k+v", "packed_rows": [0, 96]}
    assert report.layers["v"] == {"packed_as": "q+k+v", "packed_rows": [128, 168]}
    assert set(report.layers) == {"q", "k", "v", "gate", "up"}


# ---- what is not fused, and why

LEARNED = {"vq": "vq1d16-ballxall-g64"}
REFUSED: dict[str, tuple[dict[str, Any], nn.Module, dict[str, Any], dict[str, str]]] = {
    "bias": (INT4, Block(bias="qv"), {}, {"k": "int4-g32-sym/int8-block128 beside int4-g32-sym/int8-block128, with bias"}),
    "format": (
        INT4, Block(bias=""), {"overrides": [{"select": {"name": "v"}, "scheme": {"bits": 8}}]},
        {"v": "int8-row-sym/float beside int4-g32-sym/int8-block128"},
    ),
    "float": (
        INT4, Block(), {"overrides": [{"select": {"name": "k"}, "scheme": "float"}], "allow": {"min_coverage": 0.5}},
        {"k": "it stays in float"},
    ),
    "tile": (
        INT4, Block(q=96, k=40, v=32), {},
        {"v": "32 rows beside 96, 40: all but the last must be a multiple of 16"},
    ),
    "codebook": (
        LEARNED, Block(), {},
        dict.fromkeys(("q", "k", "v", "gate", "up"), "one codebook for all rows"),
    ),
    "blocks": (  # a codebook for 32 rows
        {"vq": "vq3"}, Block(q=96, k=48, v=64), {},
        {"v": "64 rows beside 96, 48: all but the last must be a multiple of 32"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_left_and_named(name: str) -> None:
    linear, model, recipe, reasons = REFUSED[name]
    graph, context = quantized(linear, model, **recipe)
    expected = run(graph, rows())
    report = fuse(graph, context)
    assert {skip.node: skip.reason for skip in report.skipped} == reasons
    assert set(report.layers) == {"q", "k", "v", "gate", "up"} - set(reasons) and report.fallbacks == []
    assert torch.equal(run(graph, rows()), expected)


def test_a_codebook_that_is_everybodys_is_stored_once() -> None:
    graph, context = quantized(FORMATS["nf4"])
    fuse(graph, context)
    assert attribute(graph.module, "q+k+v.codebooks").shape == (1, 1, 1, 16)
    assert attribute(graph.module, "q+k+v.codebook_scales").shape == (1, 1)


def test_outlier_columns_ranges_and_ties_are_refused() -> None:
    graph, context = calibrated({"bits": 8, "activations": "int8-static"}, Block().eval(), [rows()])
    RoundToNearest().run(graph, context)
    context.static_ranges |= {site.name: (0.02, -3) for site in graph.sites} | {"up": (0.03, -3)}
    context.outliers["q"] = torch.tensor([0, 7])
    graph.site("k").tie_group = 5
    QuantizeSites().run(graph, context)
    report = fuse(graph, context)
    assert (report.matched, report.changed, report.layers) == (2, 0, {})
    assert {skip.node: skip.reason for skip in report.skipped} == {
        "q": "it has outlier columns of its own",
        "k": "it shares its weight with another layer",
        "v": "no other layer that reads its input can be fused",
        "gate": "its activations have a range of their own",
        "up": "its activations have a range of their own",
    }


def test_only_neighbours_are_fused() -> None:
    """What reads the same value beyond another layer is used later, and may wait until then."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k1, self.v1, self.o1, self.k2, self.v2 = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.o1(torch.relu(self.k1(x)) * self.v1(x))
            return y + torch.sigmoid(self.k2(x)) * self.v2(x)

    graph, context = quantized(INT4, Cross())
    assert [[site.name for site in found] for found in runs(graph.sites)] == [["k1", "v1"], ["k2", "v2"]]
    fuse(graph, context)
    assert [part.target for part in graph.nodes if "codes" in str(part.target)] == ["k1+v1.codes", "o1.codes", "k2+v2.codes"]


def test_experts_are_named_and_left() -> None:
    graph, context = quantized(INT4)
    graph.site("gate").kind = graph.site("up").kind = "experts"
    report = fuse(graph, context)
    assert {skip.reason for skip in report.skipped} == {"experts have an op of their own"} and report.changed == 1


# ---- what else must stay right


def test_names_say_what_is_inside() -> None:
    module = torch.fx.GraphModule({}, torch.fx.Graph())
    assert fused_name(module, ["a.0.q", "a.0.k", "a.0.v"]) == "a.0.q+k+v"
    assert fused_name(module, ["a.q.proj", "a.k.proj"]) == "a.q_proj+k_proj"
    assert fused_name(module, ["q", "q#2"]) == "q+q#2"
    module.add_submodule("q+k", nn.Module())
    assert fused_name(module, ["q", "k"]) == "q+k#2"


def test_a_view_that_strides_forbid_becomes_a_reshape() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).view(-1, 4, 24).view(-1, 24)  # rows and heads as one axis
            return (q.unsqueeze(0) * 2).view(-1, 4, 24) + self.k(x).view(-1, 4, 24)

    graph, context = quantized(INT4, Heads())
    expected = run(graph, rows())
    fuse(graph, context)
    assert torch.equal(run(graph, rows()), expected)
    text = graph_text(graph.module)
    assert text.count("aten.reshape(") == 1 and text.count("aten.view(") == 3


def test_pending_factors_and_narrow_storage_of_a_bias_are_applied() -> None:
    graph, context = quantized(INT4)
    k = graph.constant("k.bias").clone()
    graph.set_constant("q.bias", graph.constant("q.bias").to(torch.bfloat16))
    graph.scale_rows("k.bias", torch.full((32,), 3.0))
    q = graph.constant("q.bias").clone()
    fuse(graph, context)
    bias = graph.constant("q+k+v.bias")
    assert bias.dtype == torch.float32
    assert torch.equal(bias[:96], q) and torch.equal(bias[96:128], 3 * k)


def test_joined_tensors_lie_in_files_and_their_parts_are_let_go(tmp_path: Path) -> None:
    graph, context = calibrated(INT4, Block().eval(), [rows()])
    RoundToNearest().run(graph, context)
    context.scratch = tmp_path
    QuantizeSites().run(graph, context)
    fuse(graph, context)
    left = {id(context.solutions[site.name]) for site in graph.sites if site.name in ("o", "down")}
    assert set(context.packed) == left
    assert {path.name.split("-")[-1] for path in tmp_path.iterdir()} >= {"q_k_v.codes", "q_k_v.scales", "gate_up.codes"}


# ---- from a recipe to the files


@pytest.mark.parametrize(("name", "target"), [("int4", "onnx"), ("nf4", "torch"), ("int8-static", "torch")])
def test_artifacts(name: str, target: str, tmp_path: Path) -> None:
    """Fused and not: the same bits, every byte counted, the same layers in the records."""
    passes = ["round_to_nearest", *(["place_observers", "calibrate_ranges"] if name == "int8-static" else [])]
    recipe = {"name": "r", "linear": FORMATS[name], "passes": passes}
    results = [
        qcompiler.compile(
            Block().eval(), output=tmp_path / str(fuse), example=(rows(40),), recipe=recipe | {"fuse": fuse}, target=target
        )
        for fuse in (True, False)
    ]
    fused, plain = results
    names = [[entry.record["name"] for entry in result.quantizer.trace.entries] for result in results]
    assert ["fuse_linears" in found for found in names] == [True, False]
    outputs = []
    for result in results:
        session = Session(result.path, threads=1)
        (port,), (output,) = session.artifact.inputs, session.artifact.outputs
        outputs.append([session.run(**{port.name: rows(count).numpy()})[output.name] for count in (1, 5)])
        totals = dict(json.loads((result.path / "layers.json").read_text())["totals"]["bytes"])
        files = [path for path in result.path.iterdir() if path.name.startswith("model.")]
        assert totals.pop("total") == sum(totals.values()) == sum(path.stat().st_size for path in files)
        assert target != "torch" or totals["float"] == 4 * (96 + 32 + 40), "the biases and nothing else"
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))
    where = ("packed_as", "packed_rows", "edges")
    described = [[{k: v for k, v in record.items() if k not in where} for record in r.layers["layers"]] for r in results]
    assert described[0] == described[1]
    assert [record["packed_as"] for record in fused.layers["layers"]] == ["q+k+v"] * 3 + ["o"] + ["gate+up"] * 2 + ["down"]
    assert [record["packed_as"] for record in plain.layers["layers"]] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_stock_has_an_op_for_every_layer(tmp_path: Path) -> None:
    recipe = {"name": "r", "linear": {"bits": 4, "group": 32}}
    model = Block().eval()
    result = qcompiler.compile(model, output=tmp_path / "out", example=(rows(40),), recipe=recipe, target="onnx-stock")
    assert "fuse_linears" not in [entry.record["name"] for entry in result.quantizer.trace.entries]
    assert all(record["packed_as"] == record["name"] for record in result.layers["layers"])
