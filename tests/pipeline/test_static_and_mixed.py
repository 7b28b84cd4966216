"""Static activations and outlier columns from a recipe to every target: what runs is the rewritten graph, every byte counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.errors import GateError, InputError, UnsupportedError
from qcompiler.graph.constants import attribute
from qcompiler.ops import SPECS
from qcompiler.ops.torch_ops import overload
from qcompiler.passes.rewrite.quantize_sites import QuantizeSites
from qcompiler.passes.rewrite.site_product import SiteProduct, quantized_product
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.runtime.session import Session
from tests.calibrated import batches, calibrated

# Relative to the largest output: float32 sums in another order; stock rounds activations that lie below a symmetric range.
EXACT, STOCK = 1e-5, 2e-2
STATIC = {"bits": 8, "activations": "int8-static"}
TOKEN = {"bits": 8, "activations": "int8-token"}
RECIPES: dict[str, dict[str, Any]] = {
    "static": {"linear": STATIC, "passes": ["round_to_nearest", "place_observers", {"calibrate_ranges": {"symmetric": False}}]},
    "mixed": {"linear": TOKEN, "passes": [{"llm_int8": {"threshold": 20.0, "max_share": 0.1}}, "round_to_nearest"]},
}
OP = {"static": "linear_nbit", "mixed": "linear_mixed"}


class Network(nn.Module):
    """Two layers with something between them; two columns of the first one's input are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(96, 70), nn.Linear(70, 33, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def rows(count: int, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, 96, generator=torch.Generator().manual_seed(seed))
    x[:, [5, 77]] *= 50
    return x


CASES = [(name, target) for name in RECIPES for target in ("onnx", "onnx-stock", "torch")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, qcompiler.CompileResult]:
    name, target = request.param
    recipe = {"name": name, "allow": {"unmatched": ["llm_int8"]}, **RECIPES[name]}
    output = tmp_path_factory.mktemp(name) / "out"
    return name, qcompiler.compile(Network().eval(), output=output, example=(rows(40),), recipe=recipe, target=target)


def test_what_runs_is_the_rewritten_graph(compiled: tuple[str, qcompiler.CompileResult]) -> None:
    name, result = compiled
    session = Session(result.path, threads=1)
    (port,), (output,) = session.artifact.inputs, session.artifact.outputs
    module = result.quantizer.graph.module
    assert overload(OP[name]) in {node.target for node in module.graph.nodes}
    bound = STOCK if result.manifest["target"] == "onnx-stock" else EXACT
    for count in (1, 3, 17):
        x = rows(count, seed=count)
        found = session.run(**{port.name: x.numpy()})[output.name]
        (expected,) = torch.utils._pytree.tree_leaves(module(x=x))
        assert np.abs(found - expected.detach().numpy()).max() <= bound * expected.abs().max().item()
        reference = Network()(x).detach()
        # one range for columns of which two are 50 times as large costs accuracy; the columns in float win it back
        assert np.abs(found - reference.numpy()).max() <= (0.1 if name == "static" else 0.03) * reference.abs().max().item()


def test_every_byte_has_a_kind(compiled: tuple[str, qcompiler.CompileResult]) -> None:
    name, result = compiled
    totals = dict(json.loads((result.path / "layers.json").read_text())["totals"]["bytes"])
    files = [path for path in result.path.iterdir() if path.name.startswith("model.")]
    assert totals.pop("total") == sum(totals.values()) == sum(path.stat().st_size for path in files)
    assert min(totals.values()) >= 0
    packed = sum(totals[kind] for kind in ("codes", "scales", "zeros", "padding", "outliers", "activations"))
    inline = sum(record["bytes"] for record in result.layers["layers"]) - packed
    assert 0 <= inline <= 512, "what a layer has beside its weight, as far as it is small enough for the graph"
    target = result.manifest["target"]
    if name == "mixed" and target != "onnx-stock":
        # two columns of 70 float16 weights, and their indices where small constants are not in the graph
        assert totals["outliers"] == 2 * (2 * 70 + 4 * (target == "torch"))
        assert [record.get("outlier_columns") for record in result.layers["layers"]] == [2, None]
    if name == "static" and target != "onnx-stock":
        assert totals["activations"] == (2 * 5 + 4 * (70 + 33) if target == "torch" else 4 * 70)


# ---- the rewrite


def solved(scheme: dict[str, Any]):
    graph, context = calibrated(scheme)
    RoundToNearest().run(graph, context)
    return graph, context


def test_the_product_of_a_site_is_what_its_op_computes() -> None:
    """quantized_product before the rewrite gives the bits of the node after it: with a range, with columns, with both."""
    graph, context = solved(STATIC)
    context.static_ranges |= {site.name: (0.04 + 0.01 * index, -index) for index, site in enumerate(graph.sites)}
    context.outliers |= {"q": torch.tensor([0, 7, 95]), "v": torch.tensor([], dtype=torch.int64)}
    (x, *_) = batches()
    made = {}
    for site in graph.sites:
        held = x if site.shape[1] == x.shape[1] else torch.randn(4, site.shape[1])
        bias = None if site.bias is None else graph.constant(site.bias)
        weight = graph.constant(site.weight)
        arguments = (site, context.solutions[site.name], context.schemes[site.name], context)
        made[site.name] = (held, quantized_product(*arguments, held, bias, weight))
        again = SiteProduct.of(*arguments, weight)
        assert torch.equal(again(held, bias), made[site.name][1])
    report = QuantizeSites().run(graph, context)
    assert report.changed == len(graph.sites) == 7
    for site in graph.sites:
        assert site.node.target is overload("linear_mixed" if site.name in context.outliers else "linear_nbit")
        held, expected = made[site.name]
        spec = SPECS[site.node.target.name().removeprefix("qcompiler::")]
        values = [attribute(graph.module, a.target) if getattr(a, "op", "") == "get_attr" else a for a in site.node.args[1:]]
        assert torch.equal(site.node.target(held, *values), expected), site.name
        assert len(site.node.args) == len(spec.inputs) + len(spec.attributes)
    layers = report.layers
    assert layers["q"]["outlier_columns"] == 3 and layers["q"]["beside"]["activations"] == 4  # Z = 0: no zero point, no offset
    assert layers["k"]["beside"] == {"activations": 4 + 1 + 4 * 96} and layers["v"]["outlier_columns"] == 0
    graph.module.graph.lint()


def test_the_float_columns_are_those_of_the_float_weight() -> None:
    graph, context = solved({"bits": 4, "group": 32, "activations": "int8-token"})
    columns = torch.tensor([3, 40])
    context.outliers["down"] = columns
    weight = graph.constant("down.weight").clone()
    x = torch.zeros(2, weight.shape[1])
    x[:, columns] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    site = graph.site("down")
    y = quantized_product(site, context.solutions["down"], context.schemes["down"], context, x, None, weight)
    assert torch.equal(y, weight[:, columns].half().float().T)


def test_a_module_called_twice_has_one_weight_and_two_ranges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(96, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.sigmoid(self.layer(x)))

    graph, context = calibrated(STATIC, Twice().eval())
    RoundToNearest().run(graph, context)
    context.static_ranges |= {"layer": (0.05, 3), "layer#2": (1 / 255, -128)}
    QuantizeSites().run(graph, context)
    first, second = (site.node.args for site in graph.sites)
    assert first[1].target == second[1].target and first[5].target != second[5].target
    (x, *_) = batches()
    (name,) = (str(node.target) for node in graph.nodes if node.op == "placeholder")
    (y,) = torch.utils._pytree.tree_leaves(graph.module(**{name: x}))
    assert y.shape == x.shape and torch.isfinite(y).all()


def test_a_static_site_without_a_range_is_refused_by_name() -> None:
    graph, context = solved(STATIC)
    context.static_ranges |= {site.name: (0.05, 0) for site in graph.sites if site.name != "gate"}
    words = "layer gate: no calibrated range .*; add place_observers and calibrate_ranges to the recipe's passes"
    with pytest.raises(GateError, match=words):
        QuantizeSites().run(graph, context)


def test_a_recipe_that_forgets_the_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="layer up: no calibrated range"):
        qcompiler.compile(Network().eval(), output=tmp_path / "out", example=(rows(4),), recipe={"name": "r", "linear": STATIC})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found, words", [((0.0, 0), "above 0"), ((0.1, 200), "zero point .* is 200")])
def test_a_range_that_is_none_is_refused_by_name(found: tuple[float, int], words: str) -> None:
    graph, context = solved(STATIC)
    context.static_ranges |= {site.name: found for site in graph.sites}
    with pytest.raises(InputError, match=f"layer q: .*{words}"):
        QuantizeSites().run(graph, context)


BAD_COLUMNS = [([5, 5], "follows 5"), ([9, 2], "column 2 follows 9"), ([96], "column 96"), ([-1], "column -1")]


@pytest.mark.parametrize("columns, words", BAD_COLUMNS)
def test_columns_that_are_none_are_refused_by_name(columns: list[int], words: str) -> None:
    graph, context = solved(TOKEN)
    context.outliers["k"] = torch.tensor(columns)
    with pytest.raises(InputError, match=f"layer k: .*{words}"):
        QuantizeSites().run(graph, context)


def test_grouped_static_weights_are_refused_for_stock(tmp_path: Path) -> None:
    recipe = {"name": "r", "linear": {"bits": 4, "group": 32, "activations": "int8-static"}}
    with pytest.raises(UnsupportedError, match="int4-g32-sym with int8-static activations; nearest: int8-row-sym") as error:
        qcompiler.compile(Network().eval(), output=tmp_path / "out", example=(rows(4),), recipe=recipe, target="onnx-stock")
    assert error.value.exit_code == 4
