"""Models of one com.microsoft::GroupQueryAttention over a shared cache, and runs of them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper

from qcompiler.lower.own_attention import use_own_attention
from qcompiler.lower.share_cache import CacheResult
from qcompiler.runtime.library import library_path

SHARED = CacheResult("shared", "past_length")
HEADS, KV_HEADS, HEAD = 6, 2, 16


@dataclass(frozen=True)
class Shape:
    """What the node is given: 6 query heads of 16 columns, 2 of keys and values; `bias` heads of a bias (0: none)."""

    packed: bool = False
    rotary: int = 0
    positions: bool = False
    bias: int = 0
    interleaved: int = 0
    window: int = -1
    scale: float = 0.0

    def __str__(self) -> str:
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != type(self).__dataclass_fields__[k].default) or "plain"


def model(shape: Shape, prefix: str = "", **attributes: Any) -> ir.Model:
    """One node `att`; `attributes` beside those of the shape. `prefix` is of the names of all values."""
    names = ["q", *(["", ""] if shape.packed else ["k", "v"]), "pk", "pv", "last", "total"]
    names += [*(["cos", "sin"] if shape.rotary else ["", ""]), "pos" if shape.positions else "", "bias" if shape.bias else ""]
    while not names[-1]:
        names.pop()
    width = (HEADS + 2 * KV_HEADS if shape.packed else HEADS) * HEAD
    cache = [1, KV_HEADS, "capacity", HEAD]
    shapes: dict[str, tuple[int, list[Any]]] = {
        "q": (T.FLOAT, [1, "n", width]), "k": (T.FLOAT, [1, "n", KV_HEADS * HEAD]), "v": (T.FLOAT, [1, "n", KV_HEADS * HEAD]),
        "pk": (T.FLOAT, cache), "pv": (T.FLOAT, cache), "last": (T.INT32, [None]), "total": (T.INT32, None),
        "cos": (T.FLOAT, ["m", shape.rotary // 2]), "sin": (T.FLOAT, ["m", shape.rotary // 2]), "pos": (T.INT64, [1, "p"]),
        "bias": (T.FLOAT, [1, "h", "r", "t"]),
    }  # fmt: skip
    info = lambda name: helper.make_tensor_value_info(prefix + name, *shapes[name])  # noqa: E731
    given = {
        "num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int(shape.rotary > 0), "rotary_interleaved": shape.interleaved,
        "local_window_size": shape.window, "scale": shape.scale, **attributes,
    }  # fmt: skip
    outputs = [("y", [1, "n", HEADS * HEAD]), ("nk", [1, KV_HEADS, "capacity", HEAD]), ("nv", [1, KV_HEADS, "capacity", HEAD])]
    node = helper.make_node(
        "GroupQueryAttention", [name and prefix + name for name in names], [prefix + name for name, _ in outputs],
        domain="com.microsoft", name="att", **given,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one", [info(name) for name in names if name],
        [helper.make_tensor_value_info(prefix + name, T.FLOAT, dims) for name, dims in outputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def own(shape: Shape, **attributes: Any) -> ir.Model:
    """The same as our op."""
    made = model(shape, **attributes)
    assert use_own_attention(made, SHARED).matched
    return made


def session(made: ir.Model, library: bool = False, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(shape: Shape, past: int, rows: int, room: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(past + 100 * rows)
    normal = lambda *dims: rng.normal(size=dims).astype(np.float32)  # noqa: E731
    total = past + rows
    given = {
        "q": normal(1, rows, (HEADS + 2 * KV_HEADS if shape.packed else HEADS) * HEAD),
        "pk": normal(1, KV_HEADS, total + room, HEAD), "pv": normal(1, KV_HEADS, total + room, HEAD),
        "last": np.array([total - 1], np.int32), "total": np.array(total, np.int32),
    }  # fmt: skip
    if not shape.packed:
        given |= {"k": normal(1, rows, KV_HEADS * HEAD), "v": normal(1, rows, KV_HEADS * HEAD)}
    if shape.rotary:
        angles = rng.uniform(0, 6, (total + room + 1, shape.rotary // 2))
        given |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if shape.positions:
        given["pos"] = np.arange(past, total)[None]
    if shape.bias:
        given["bias"] = normal(1, shape.bias, rows, total)
    return given


def in_place(run: ort.InferenceSession, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The result and both caches, which are one buffer with the past ones; what `given` holds stays as it is."""
    binding = run.io_binding()
    arrays = {name: array.copy() for name, array in given.items()}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", "cpu")
    binding.bind_ortvalue_output("nk", values["pk"])
    binding.bind_ortvalue_output("nv", values["pv"])
    run.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), arrays["pk"], arrays["pv"]]
