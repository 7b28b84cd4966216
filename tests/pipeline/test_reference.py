"""The reference model from end to end: accuracy, agreement of the runtimes, records, the same bytes twice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree

import qcompiler
from qcompiler.capture.checkpoint import load
from qcompiler.capture.feeds import feed
from qcompiler.capture.prepare import prepare
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.evaluate.metrics import token_divergence
from qcompiler.evaluate.text import evaluation_text
from qcompiler.evaluate.tokens import load_tokens
from qcompiler.ops.torch_ops import overload
from qcompiler.runtime.artifact import open_artifact, verify_files
from qcompiler.runtime.session import Session
from tests.pipeline.compiled import reference
from tests.pipeline.rewire import float_artifact, float_module

WINDOW, WINDOWS = 250, 8


@pytest.mark.parametrize("recipe,ratio,divergence,top", [("int8", 1.003, 0.004, 0.96), ("int4", 1.018, 0.017, 0.9)])
def test_accuracy(recipe, ratio, divergence, top):
    scores = evaluate(str(reference(recipe).path), against="reference", max_windows=120, threads=1)
    assert scores["ratio"] <= ratio
    assert scores["kld_mean"] < divergence
    assert scores["same_top"] >= top


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    ids = load_tokens(reference("int4").path).encode(evaluation_text().content[:20000])
    return ids[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)


def by_session(path, tokens: np.ndarray, **options) -> np.ndarray:
    session = Session(path, threads=1, **options)
    logits = []
    for window in tokens:
        session.reset()
        logits.append(session.logits(window))
    return np.concatenate(logits)


class Perturbed(torch.fx.Interpreter):
    """Runs a graph with the output of its embedding multiplied by 1 + 1e-7 · noise, about its last bit."""

    def __init__(self, module: torch.fx.GraphModule, noise: torch.Generator) -> None:
        super().__init__(module)
        self.noise = noise

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is overload("embedding_nbit"):
            result = result * (1 + 1e-7 * torch.randn(result.shape, generator=self.noise))
        return result


def by_torch(module: torch.fx.GraphModule, tokens: np.ndarray, noise: torch.Generator | None = None) -> np.ndarray:
    prepared = prepare(load("reference").model)
    interpreter = torch.fx.Interpreter(module) if noise is None else Perturbed(module, noise)
    logits = []
    with torch.no_grad():
        for window in tokens:
            leaves = _pytree.tree_leaves(feed(prepared, torch.from_numpy(window)[None]))
            logits.append(_pytree.tree_leaves(interpreter.run(*leaves))[0][0].numpy())
    return np.concatenate(logits)


@pytest.mark.filterwarnings("ignore:running without the op library")  # said once a process
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_runtimes_agree(tokens, recipe):
    """2,000 tokens, teacher-forced: ONNX Runtime with the library, without it, and torch, bit for bit.

    Nothing less would do. With int8 activations a last bit moves a value at the edge between two integers to the other side, a
    step of 1/127 of the largest value in its block, and that moves more values in the next layer: after six layers the argmax of
    one token in eighty is another.
    """
    assert tokens.size == 2000
    path = reference(recipe).path
    library = by_session(path, tokens)
    np.testing.assert_array_equal(by_session(path, tokens, portable=True), library)
    np.testing.assert_array_equal(by_session(reference(recipe, "torch").path, tokens), library)


def test_attention_of_the_runtimes_is_within_the_model_s_own_sensitivity(tokens):
    """With `own_attention: false`: ONNX Runtime's and torch's attention differ from ours and from each other in the last bits,
    and move the logits no further than torch's move when the last bits of its embedding do."""
    result = reference("int4", own_attention=False)
    module = reference("int4").quantizer.graph.module
    torch_ = by_torch(module, tokens)
    sensitivity = token_divergence(torch_, by_torch(module, tokens, torch.Generator().manual_seed(0)))[0].mean()
    for other in (by_session(result.path, tokens), by_session(reference("int4").path, tokens)):
        assert token_divergence(other, torch_)[0].mean() <= sensitivity


@pytest.mark.filterwarnings("ignore:running without the op library")  # said once a process
def test_runtimes_agree_with_float_activations(tokens, tmp_path):
    result = reference("int4")
    path = float_artifact(result.path, tmp_path / "float")
    library = by_session(path, tokens)
    scale = np.abs(library).max()
    others = [by_torch(float_module(result.quantizer.graph.module), tokens)]
    others.append(by_session(path, tokens, portable=True))
    for other in others:
        assert np.abs(library - other).max() <= 1e-4 * scale


def test_stock_runs_the_same_model_without_our_ops(tokens):
    stock = reference("int4", "onnx-stock")
    found, expected = by_session(stock.path, tokens[:2]), by_session(reference("int4").path, tokens[:2])
    # int8 activations are rounded a block of 32 there, of 128 here
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_the_cache_is_one_shared_buffer():
    manifest = reference("int4").manifest
    assert manifest["cache"]["kind"] == "shared" and manifest["unfused"] == []


def test_a_layer_is_five_nodes():
    lowering = json.loads((reference("int4").path / "trace/lowering.json").read_text())
    assert lowering["ops"]["ai.qcompiler::GroupQueryAttention"] == 6
    assert lowering["notes"]["own_attention"] == {"matched": {"packed-rotary-positions": 6}, "skipped": []}
    # q, k and v; attention; o with the sum; gate and up with norm and activation; down with the sum
    assert lowering["ops"]["ai.qcompiler::LinearNBit"] == 6 * 4 + 1
    # beside layers: tokens, positions, angles in double precision, the head
    assert sum(lowering["ops"].values()) <= 6 * 5 + 28 and not {"Split", "Gather"} & lowering["ops"].keys()


def test_records(tmp_path):
    result = reference("int4")
    assert verify_files(open_artifact(result.path)) > 10
    layers = json.loads((result.path / "layers.json").read_text())
    assert len(layers["layers"]) == 44 and layers["totals"]["coverage"] == 1
    embed, head = layers["layers"][0], layers["layers"][-1]
    assert (embed["role"], head["role"]) == ("embed", "head")
    assert embed["tie_group"] == head["tie_group"] is not None and embed["packed_as"] == head["packed_as"]
    for layer in layers["layers"]:
        assert layer["weight_sqnr_db"] > 15
        if layer["kind"] == "linear":
            assert layer["output_sqnr_db"] > 12
    sizes = layers["totals"]["bytes"]
    files = sum((result.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert sizes["total"] == files == sum(v for k, v in sizes.items() if k != "total")
    passes = [json.loads(line) for line in (result.path / "trace/passes.jsonl").read_text().splitlines()]
    assert [p["index"] for p in passes] == list(range(len(passes)))
    expected = {"capture", "find_sites", "round_to_nearest", "measure_outputs", "quantize_sites"}
    assert expected <= {p["name"] for p in passes}
    for record in passes:
        assert (result.path / record["graph"]).is_file()


def test_equal_inputs_give_equal_bytes(tmp_path):
    again = qcompiler.compile("reference", output=tmp_path / "again", recipe="int4", samples=2, length=64)
    first = reference("int4").path
    skipped = {"manifest.json", "trace/timings.jsonl", "trace/environment.json"}
    names = {str(p.relative_to(first)) for p in first.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(again.path)) for p in again.path.rglob("*") if p.is_file()}
    for name in sorted(names - skipped):
        assert (first / name).read_bytes() == (again.path / name).read_bytes(), name
