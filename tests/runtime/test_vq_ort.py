"""LinearVQ and EmbeddingVQ in ONNX Runtime and through ctypes: the kernels' bits, errors that name the node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ops.formats import VqFormat
from qcompiler.runtime import library, library_vq
from tests.runtime import vq_oracle as oracle
from tests.runtime.ort_models import DOMAIN, NODE, session
from tests.runtime.vq_oracle import VqForm, VqWeight

RNG = np.random.default_rng(11)
FORM = VqForm(2, 16, 16, 128, 128)
FORMS = [VqForm(*book, *block) for book, block in zip(oracle.CODEBOOKS, (*oracle.BLOCKS, (16, 256, 128)), strict=True)]


def sizes(weight: VqWeight) -> dict[str, int]:
    form = weight.form
    n, k = weight.shape
    block = {"block_rows": form.block_rows, "block_columns": form.block_columns}
    return {"dim": form.dim, "centroids": form.centroids, **block, "group": form.group, "n": n, "k": k}


def tensors(weight: VqWeight) -> dict[str, np.ndarray]:
    shapes = library_vq.vq_shapes(**sizes(weight))
    return {name: getattr(weight, name).reshape(shape) for name, shape in shapes._asdict().items()}


def save(
    path: Path, weight: VqWeight, *, activation: int | None = 0, bias: np.ndarray | None = None, constant: bool = True,
    shape: list[Any] | None = None, replace: Mapping[str, np.ndarray] | None = None, **attrs: int,
) -> Path:  # fmt: skip
    """A model with one node: LinearVQ, or with `activation` None EmbeddingVQ."""
    embedding = activation is None
    arrays = tensors(weight) | ({} if bias is None else {"bias": bias}) | dict(replace or {})
    attributes: dict[str, Any] = sizes(weight) | {"layout_version": 1} | ({} if embedding else {"activation": activation}) | attrs
    if embedding:
        op, first = "EmbeddingVQ", ("indices", TensorProto.INT64, shape or ["count"])
    else:
        op, first = "LinearVQ", ("x", TensorProto.FLOAT, shape or ["rows", attributes["k"]])
    node = helper.make_node(op, [first[0], *arrays], ["y"], name=NODE, domain=DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info(*first)]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items() if constant]
    for name, array in () if constant else arrays.items():
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    return path


def make(form: VqForm = FORM, n: int = 33, k: int = 200) -> VqWeight:
    return oracle.make_weight(RNG, form, n, k)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_linear_to_the_bit(form: VqForm, activation: int, constant: bool, tmp_path: Path) -> None:
    weight = make(form, 50, 300)
    bias = RNG.standard_normal(50).astype(np.float32) if constant else None
    x = RNG.standard_normal((5, 300)).astype(np.float32)
    expected = oracle.linear(weight, x, activation, bias)
    model = session(save(tmp_path / "m.onnx", weight, activation=activation, bias=bias, constant=constant))
    same_bits(model.run(None, {"x": x} | ({} if constant else tensors(weight)))[0], expected)
    direct = library_vq.linear_vq(x[None], **tensors(weight), **sizes(weight), activation=activation, bias=bias)
    same_bits(direct, expected[None])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_embedding_to_the_bit(form: VqForm, tmp_path: Path) -> None:
    weight = make(form, 37, 150)
    indices = np.array([[0, 36, -1], [-37, 5, 5]], np.int64)
    y = session(save(tmp_path / "m.onnx", weight, activation=None, shape=["a", "b"])).run(None, {"indices": indices})[0]
    same_bits(y, weight.dense()[indices])
    same_bits(library_vq.embedding_vq(indices % 37, **tensors(weight), **sizes(weight)), y)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (1, 2, 1, 3)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], tmp_path: Path) -> None:
    weight = make()
    x = RNG.standard_normal((*leading, 200)).astype(np.float32)
    names = [f"d{i}" for i in range(len(leading))]
    y = session(save(tmp_path / "m.onnx", weight, activation=2, shape=[*names, 200])).run(None, {"x": x})[0]
    same_bits(y, oracle.linear(weight, x.reshape(-1, 200), 2, None).reshape(*leading, 33))


@pytest.mark.skipif(tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24), reason="no shape inference before 1.24")
def test_shape_inference_keeps_the_names_of_dimensions(tmp_path: Path) -> None:
    weight = make()
    path = save(tmp_path / "m.onnx", weight, shape=["batch", "sequence", 200])
    assert session(path).get_outputs()[0].shape == ["batch", "sequence", 33]
    path = save(tmp_path / "e.onnx", weight, activation=None, shape=["batch", 5])
    assert session(path).get_outputs()[0].shape == ["batch", 5, 200]


# ---- what does not fit is refused in words

BAD_ATTRIBUTES = [
    ({"dim": 3}, "attribute 'dim' is 3, expected 1, 2 or 4"),
    ({"centroids": 8}, "attribute 'centroids' is 8 with dim 2, expected 16, 32, 64 or 256"),
    ({"dim": 1, "centroids": 64}, "attribute 'centroids' is 64 with dim 1, expected 4, 8 or 16"),
    ({"dim": 4}, "attribute 'centroids' is 16 with dim 4, expected 256"),
    ({"block_rows": 8}, "attribute 'block_rows' is 8, expected a multiple of 16, or 0"),
    ({"block_rows": 1 << 40}, f"attribute 'block_rows' is {1 << 40}, expected a multiple of 16"),
    ({"block_columns": 64}, "attribute 'block_columns' is 64, expected a multiple of 128, or 0"),
    ({"block_columns": -128}, "attribute 'block_columns' is -128, expected a multiple of 128, or 0"),
    ({"group": 48}, "attribute 'group' is 48, expected 0 (the whole row), 32, 64 or 128"),
    ({"n": 0}, "attributes 'n' and 'k' are 0 and 200"),
    ({"k": 1 << 40}, "expected 1 to 2147483647"),
    ({"layout_version": 2}, "run `qcompiler repack`"),
    ({"n": 64}, "input 1 (codes) is uint8 [3, 13, 64], expected uint8 [4, 13, 64] (dim 2, centroids 16"),
    ({"centroids": 64}, "input 1 (codes) is uint8 [3, 13, 64], expected uint8 [3, 7, 192] (dim 2, centroids 64"),
    ({"block_rows": 32}, "input 2 (codebooks) is int8 [3, 2, 2, 16], expected int8 [2, 2, 2, 16]"),
    ({"group": 32}, "input 4 (scales) is float16 [3, 2, 16], expected float16 [3, 7, 16]"),
]


@pytest.mark.parametrize("attrs, message", BAD_ATTRIBUTES)
@pytest.mark.parametrize("activation", [0, None], ids=["LinearVQ", "EmbeddingVQ"])
def test_bad_attributes(attrs: dict[str, int], message: str, activation: int | None, tmp_path: Path) -> None:
    op = "EmbeddingVQ" if activation is None else "LinearVQ"
    with pytest.raises(Exception, match=re.escape(f"{op} node '{NODE}'") + ".*" + re.escape(message)):
        session(save(tmp_path / "m.onnx", make(), activation=activation, **attrs))


@pytest.mark.parametrize("kind, name", [(1, "1 (int8 per token)"), (3, "3 (static int8)"), (7, "7")])
def test_other_activations_are_refused_by_name(kind: int, name: str, tmp_path: Path) -> None:
    message = f"attribute 'activation' is {name}, expected 0 (float) or 2 (int8 per block of 128)"
    with pytest.raises(Exception, match=re.escape(f"LinearVQ node '{NODE}'") + ".*" + re.escape(message)):
        session(save(tmp_path / "m.onnx", make(), activation=kind))


BAD_TENSORS = [
    ("codes", np.zeros((3, 12, 64), np.uint8), "input 1 (codes) is uint8 [3, 12, 64], expected uint8 [3, 13, 64]"),
    ("codebooks", np.zeros((3, 2, 16, 2), np.int8), "input 2 (codebooks) is int8 [3, 2, 16, 2], expected int8 [3, 2, 2, 16]"),
    ("codebook_scales", np.zeros((2, 2), np.float16), "input 3 (codebook_scales) is float16 [2, 2], expected float16 [3, 2]"),
    ("scales", np.zeros((3, 1, 16), np.float16), "input 4 (scales) is float16 [3, 1, 16], expected float16 [3, 2, 16]"),
    ("bias", np.zeros(32, np.float32), "input 5 (bias) is float [32], expected float [33]"),
]


@pytest.mark.parametrize("name, array, message", BAD_TENSORS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_bad_tensors(name: str, array: np.ndarray, message: str, constant: bool, tmp_path: Path) -> None:
    weight = make()
    path = save(tmp_path / "m.onnx", weight, constant=constant, replace={name: array})
    with pytest.raises(Exception, match=re.escape(NODE) + ".*" + re.escape(message)):
        model = session(path)  # a constant is refused here, before any run
        if not constant:
            model.run(None, {"x": np.zeros((1, 200), np.float32), **tensors(weight), name: array})


@pytest.mark.parametrize("name", ["codes", "codebooks", "codebook_scales", "scales"])
def test_types_are_checked_when_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    weight = make()
    wrong = tensors(weight)[name].astype(np.int32)
    with pytest.raises(Exception, match=re.escape(NODE)):
        session(save(tmp_path / "m.onnx", weight, replace={name: wrong}))
    with pytest.raises(ValueError, match=f"{name} is int32"):
        library_vq.linear_vq(np.zeros((1, 200), np.float32), **(tensors(weight) | {name: wrong}), **sizes(weight))


@pytest.mark.parametrize("shape", [(2, 201), (3,)], ids=str)
def test_bad_activations(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = make()
    model = session(save(tmp_path / "m.onnx", weight, shape=[f"d{i}" for i in range(len(shape))]))
    with pytest.raises(Exception, match=re.escape(f"{NODE}': input 0 (X) has shape") + ".*expected float.*200"):
        model.run(None, {"x": np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 200\]"):
        library_vq.linear_vq(np.zeros(shape, np.float32), **tensors(weight), **sizes(weight))


@pytest.mark.parametrize("bad", [33, -34, 2**40])
def test_embedding_index_out_of_range(bad: int, tmp_path: Path) -> None:
    weight = make()
    model = session(save(tmp_path / "m.onnx", weight, activation=None))
    with pytest.raises(Exception, match=re.escape(f"EmbeddingVQ node '{NODE}'") + f".*{bad} at position 1"):
        model.run(None, {"indices": np.array([0, bad], np.int64)})
    with pytest.raises(RuntimeError, match=r"indices\[1\] is " + str(bad)):
        library_vq.embedding_vq(np.array([0, bad]), **tensors(weight), **sizes(weight))


@pytest.mark.parametrize("form", oracle.FORMS, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (17, 65), (1000, 4096)])
def test_shapes_hold_what_the_kernels_read(form: VqForm, n: int, k: int) -> None:
    block = form.block_rows, form.block_columns
    names = {"dim": form.dim, "centroids": form.centroids, "block_rows": block[0], "block_columns": block[1]}
    shapes = library_vq.vq_shapes(**names, group=form.group, n=n, k=k)
    lib = library.load()
    assert np.prod(shapes.codes) == lib.qc_vq_codes_bytes(n, k, form.dim, form.centroids)
    assert np.prod(shapes.codebooks) == lib.qc_vq_codebooks_bytes(n, k, form.dim, form.centroids, *block)
    assert np.prod(shapes.codebook_scales) == lib.qc_vq_codebook_count(n, k, *block)
    assert np.prod(shapes.scales) == lib.qc_scales_count(n, k, form.group)
    assert VqFormat(form.dim, form.centroids, *block, form.group).blocks(n, k) == shapes.codebook_scales
