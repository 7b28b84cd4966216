"""Small ONNX models of one LinearNBit or EmbeddingNBit node, with their weights in an external data file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ops.activation_range import INPUTS
from qcompiler.runtime.library import library_path, weight_shapes
from tests.runtime.kernel_oracle import INT8_STATIC, STATIC_SCALE, STATIC_ZERO, Weight, static_offset

DOMAIN = "ai.qcompiler"
NODE = "/layers.0/proj"


def tensors(weight: Weight) -> dict[str, np.ndarray]:
    """The weight's packed tensors in the shapes that the ops take."""
    n, k = weight.shape
    shapes = weight_shapes(bits=weight.bits, group=weight.group, n=n, k=k)
    out = {"codes": weight.codes.reshape(shapes.codes), "scales": weight.scales.reshape(shapes.scales)}
    if weight.zeros is not None:
        out["zeros"] = weight.zeros.reshape(shapes.zeros)
    return out


def static_range(weight: Weight, activation: int) -> dict[str, np.ndarray]:
    """The oracle's scale and zero point, with static activations."""
    if activation != INT8_STATIC:
        return {}
    scale, zero = np.array([STATIC_SCALE]), np.array([STATIC_ZERO], np.int8)
    return dict(zip(INPUTS, (scale, zero, static_offset(weight)), strict=True))


def attributes(weight: Weight, **more: int) -> dict[str, int]:
    n, k = weight.shape
    return {"bits": weight.bits, "group": weight.group, "n": n, "k": k, "layout_version": 1, **more}


def save(
    path: Path,
    op: str,
    arrays: Mapping[str, np.ndarray],
    attrs: Mapping[str, int],
    first: tuple[str, int, list[Any]],
    *,
    constant: bool = True,
    output_shape: list[Any] | None = None,
) -> Path:
    """A model with one node; the arrays are initializers, or graph inputs when not `constant`."""
    order = ["codes", "scales", "zeros"] + (["bias", *INPUTS] if op == "LinearNBit" else [])
    names = [name if name in arrays else "" for name in order]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(op, [first[0], *names], ["y"], name=NODE, domain=DOMAIN, **attrs)
    inputs = [helper.make_tensor_value_info(*first)]
    initializers = []
    if constant:
        initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    else:
        for name, array in arrays.items():
            element = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, element, [None] * array.ndim))
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)], initializers
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    return path


def save_linear(
    path: Path,
    weight: Weight,
    *,
    activation: int = 0,
    bias: np.ndarray | None = None,
    constant: bool = True,
    x_shape: list[Any] | None = None,
    replace: Mapping[str, np.ndarray] | None = None,
    **attrs: int,
) -> Path:
    arrays = tensors(weight) | ({} if bias is None else {"bias": bias}) | static_range(weight, activation) | dict(replace or {})
    x = ("x", TensorProto.FLOAT, x_shape or ["rows", weight.shape[1]])
    return save(
        path, "LinearNBit", arrays, attributes(weight, activation=activation) | attrs, x, constant=constant
    )  # fmt: skip


def save_embedding(path: Path, weight: Weight, *, shape: list[Any] | None = None, **attrs: int) -> Path:
    indices = ("indices", TensorProto.INT64, ["count"] if shape is None else shape)
    return save(path, "EmbeddingNBit", tensors(weight), attributes(weight) | attrs, indices)


def session(path: Path, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
