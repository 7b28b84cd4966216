"""Vector-quantized artifacts compute what their own fake-quantized torch graph computes, and their bytes add up."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.errors import GateError
from qcompiler.numerics.vq import VqWeight
from qcompiler.runtime.session import Session
from tests.captures import analysed
from tests.models import tiny
from tests.pipeline.test_architectures import assert_computes_what_its_graph_does

VQ2 = {"vq": "vq2", "activations": "int8-block128"}
MODELS = [("llama", "vq2"), ("gpt2", "vq2-4d"), ("bert", "vq2.5"), ("opt", "nf4")]
MORE = [("phi3", "vq3"), ("gemma3_text", "vq4"), ("qwen3", "vq1d-3"), ("falcon", "vq1d-4"), ("gpt_neox", "vq1d-2")]


def recipe(vq: str, **more: object) -> dict:
    linear = {"vq": vq, "activations": "int8-block128"}
    low = {"bits": 4, "group": 32}
    head = {**low, "activations": "int8-block128"}
    return {"name": vq, "linear": linear, "embed": low, "head": head, "passes": ["round_to_nearest"], **more}


@pytest.mark.parametrize(("model_type", "vq"), [*MODELS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
def test_an_artifact_computes_what_its_graph_does(model_type: str, vq: str, tmp_path):
    captured = analysed(model_type)
    result = qcompiler.compile(captured.model, output=tmp_path / "out", recipe=recipe(vq), samples=0)
    context = result.quantizer.context
    vector = [name for name, solution in context.solutions.items() if isinstance(solution, VqWeight)]
    assert vector and result.layers["totals"]["coverage"] == 1
    assert_computes_what_its_graph_does(tmp_path / "out", captured, context, model_type)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "out"
    # attention is one program's with and without our ops: else it differs in the last bits
    chosen = recipe("vq3", embed=VQ2, head=VQ2, own_attention=False)
    result = qcompiler.compile(tiny("llama"), output=folder, recipe=chosen, samples=0)
    return folder, result


def test_every_byte_of_the_files_is_for_something(artifact):
    folder, result = artifact
    sizes = dict(result.layers["totals"]["bytes"])
    total = sizes.pop("total")
    assert sum(sizes.values()) == total and sizes["codebooks"] > 0
    model = json.loads((folder / "manifest.json").read_text())["files"]
    assert total == sum((folder / name).stat().st_size for name in model if name.startswith("model.onnx"))
    linear = [layer for layer in result.layers["layers"] if layer["kind"] == "linear" and layer["role"] != "head"]
    assert all(layer["dim"] == 2 and layer["centroids"] == 64 and layer["table"] is None for layer in linear)


def test_stock_onnx_runtime_gives_the_same_bits_from_the_function_bodies(artifact):
    folder, _ = artifact
    tokens = np.arange(3, 20)
    ours, stock = (Session(folder, threads=1, portable=portable).prefill(tokens) for portable in (False, True))
    assert np.array_equal(ours, stock)


def test_lookups_with_codebooks_are_their_own_op(artifact):
    folder, _ = artifact
    ops = [node.op_type for node in ir.load(folder / "model.onnx").graph if node.domain == "ai.qcompiler"]
    assert ops.count("EmbeddingVQ") == 1 and set(ops) == {"EmbeddingVQ", "LinearVQ"}


def test_a_plan_knows_the_sizes_before_anything_is_solved(artifact):
    _, result = artifact
    planned = qcompiler.plan(tiny("llama"), recipe=recipe("vq3", embed=VQ2, head=VQ2))["totals"]["bytes"]
    for kind in ("codes", "scales", "codebooks", "padding"):
        assert planned[kind] == result.layers["totals"]["bytes"][kind], kind


def test_experts_get_another_format_and_are_counted(tmp_path):
    model = tiny("mixtral")
    with pytest.raises(GateError, match="there is no op for experts with codebooks; int4-g32-sym in place of vq2d16"):
        qcompiler.compile(model, output=tmp_path / "refused", recipe=recipe("vq2"), samples=0)
    assert not (tmp_path / "refused").exists()
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=recipe("vq2", allow={"fallbacks": 8}), samples=0)
    formats = {layer["format"] for layer in result.layers["layers"] if layer["kind"] == "experts"}
    assert formats == {"int4-g32-sym"} and result.manifest["fallbacks"]
