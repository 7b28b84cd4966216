"""`qcompiler run` on an encoder prints its vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.artifacts import REFERENCE, write_manifest
from tests.cli.process import COMPILE_ONLY, qcompiler


def encoder(folder: Path, pooled: bool) -> Path:
    """tokens [1, n] -> a row of a table each, and perhaps the first of them as the pooled output."""
    folder.mkdir()
    table = np.arange(4096 * 4, dtype=np.float32).reshape(4096, 4)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])]
    outputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, "n", 4])]
    if pooled:
        nodes.append(helper.make_node("ReduceMax", ["hidden", "axes"], ["pooled"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [1, 4]))
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])],
        outputs,
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, folder / "model.onnx")
    shutil.copy(REFERENCE / "tokenizer.json", folder)
    infos = {"hidden": [1, "n", 4], "pooled": [1, 4]}
    return write_manifest(
        folder,
        {
            "kind": "encoder",
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, "n"]}],
            "outputs": [{"name": o.name, "dtype": "float32", "shape": infos[o.name]} for o in outputs],
        },
    )


@pytest.mark.parametrize("pooled", [True, False])
def test_vector(tmp_path: Path, pooled: bool) -> None:
    artifact = encoder(tmp_path / "e", pooled)
    result = qcompiler("run", artifact, "two words", without=COMPILE_ONLY)
    assert result.returncode == 0, result.stderr
    vector = json.loads(result.stdout)
    assert len(vector) == 4 and np.allclose(np.diff(vector), 1)
    assert result.stdout.count("\n") == 1
    other = json.loads(qcompiler("run", artifact, "something else entirely").stdout)
    assert other != vector
