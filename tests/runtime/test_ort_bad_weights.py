"""Weights that do not fit what a node says about them: refused when the session is made, by node, with both numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.runtime import kernel_oracle as oracle
from tests.runtime.ort_models import DOMAIN, NODE, save_embedding, save_linear, session, tensors

RNG = np.random.default_rng(5)
N, K, EXPERTS = 33, 70, 3


def experts_arrays() -> dict[str, np.ndarray]:
    weights = [tensors(oracle.make_weight(RNG, N, K, 4, 32, True)) for _ in range(EXPERTS)]
    return {name: np.concatenate([weight[name] for weight in weights]) for name in weights[0]}


def save_experts(path: Path, arrays: dict[str, np.ndarray], **attrs: int) -> Path:
    said = {"bits": 4, "group": 32, "n": N, "k": K, "experts": EXPERTS, "activation": 0, "layout_version": 1} | attrs
    node = helper.make_node("LinearExpertsNBit", ["x", "expert", *arrays], ["y"], name=NODE, domain=DOMAIN, **said)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K]),
        helper.make_tensor_value_info("expert", TensorProto.INT64, ["rows"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "one", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def refused(path: Path, op: str, message: str) -> None:
    with pytest.raises(Exception, match=re.escape(f"{op} node '{NODE}'") + ".*" + re.escape(message)):
        session(path)


BAD_EXPERTS = [
    ({"bits": 3}, "input 2 (codes) is uint8 [9, 9, 64], expected uint8 [9, 3, 192] (bits 3"),
    ({"bits": 6}, "attribute 'bits' is 6, expected 8, 4, 3 or 2"),
    ({"group": 64}, "input 3 (scales) is float16 [9, 3, 16], expected float16 [9, 2, 16]"),
    ({"group": 16}, "attribute 'group' is 16, expected 0 (the whole row), 32, 64 or 128"),
    ({"experts": 4}, "input 2 (codes) is uint8 [9, 9, 64], expected uint8 [12, 9, 64]"),
    ({"experts": 0}, "attribute 'experts' is 0, expected 1 to"),
    ({"n": 49}, "input 2 (codes) is uint8 [9, 9, 64], expected uint8 [12, 9, 64]"),
    ({"k": 80}, "input 2 (codes) is uint8 [9, 9, 64], expected uint8 [9, 10, 64]"),
    ({"activation": 3}, "attribute 'activation' is 3, expected 0 (float), 1 (int8 per token) or 2 (int8 per block of 128)"),
    ({"layout_version": 9}, "run `qcompiler repack`"),
]


@pytest.mark.parametrize("attrs, message", BAD_EXPERTS)
def test_experts_that_do_not_fit(attrs: dict[str, int], message: str, tmp_path: Path) -> None:
    refused(save_experts(tmp_path / "m.onnx", experts_arrays(), **attrs), "LinearExpertsNBit", message)


@pytest.mark.parametrize("name, number", [("codes", 2), ("scales", 3), ("zeros", 4)])
def test_experts_whose_tensors_are_cut(name: str, number: int, tmp_path: Path) -> None:
    arrays = experts_arrays()
    whole, arrays[name] = list(arrays[name].shape), arrays[name][:, :-1]
    message = f"input {number} ({name}) is {arrays[name].dtype} {list(arrays[name].shape)}, expected {arrays[name].dtype} {whole}"
    refused(save_experts(tmp_path / "m.onnx", arrays), "LinearExpertsNBit", message)


BAD_EMBEDDINGS = [
    ({"bits": 8}, "input 1 (codes) is uint8 [3, 9, 64], expected uint8 [3, 18, 64] (bits 8"),
    ({"bits": 1}, "attribute 'bits' is 1, expected 8, 4, 3 or 2"),
    ({"group": 0}, "input 2 (scales) is float16 [3, 3, 16], expected float16 [3, 1, 16]"),
    ({"n": 16}, "input 1 (codes) is uint8 [3, 9, 64], expected uint8 [1, 9, 64]"),
    ({"k": 64}, "input 1 (codes) is uint8 [3, 9, 64], expected uint8 [3, 8, 64]"),
]


@pytest.mark.parametrize("attrs, message", BAD_EMBEDDINGS)
def test_embeddings_that_do_not_fit(attrs: dict[str, int], message: str, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, N, K, 4, 32, False)
    refused(save_embedding(tmp_path / "m.onnx", weight, **attrs), "EmbeddingNBit", message)


# In shapes that fit, so that nothing but the type is wrong.
BAD_TYPES = [("codes", np.int8), ("codes", np.float16), ("scales", np.uint16), ("scales", np.float32), ("zeros", np.int8)]


@pytest.mark.parametrize("name, dtype", BAD_TYPES)
def test_types_of_experts(name: str, dtype: type, tmp_path: Path) -> None:
    arrays = experts_arrays()
    arrays[name] = np.zeros(arrays[name].shape, dtype)
    with pytest.raises(Exception, match=re.escape(NODE)):
        session(save_experts(tmp_path / "m.onnx", arrays))


@pytest.mark.parametrize("kept", [0, 1, 4096])
def test_a_data_file_that_is_cut_is_no_read_beyond_it(kept: int, tmp_path: Path) -> None:
    """A copy that broke off: an error that names the file or the tensor, before any kernel reads."""
    weight = oracle.make_weight(RNG, 640, 512, 4, 32, False)
    path = save_linear(tmp_path / "m.onnx", weight)
    data = path.with_name("m.onnx.data")
    assert data.stat().st_size > 100_000
    data.write_bytes(data.read_bytes()[:kept])
    with pytest.raises(Exception, match="m.onnx.data|codes|scales"):
        session(path)
