"""The ops in ONNX Runtime: the kernels' bits, weights read in place, errors that name the node."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qcompiler.runtime import library
from tests.runtime import kernel_oracle as oracle
from tests.runtime.ort_models import NODE, save_embedding, save_linear, session, static_range, tensors

RNG = np.random.default_rng(7)


def direct(weight: oracle.Weight, x: np.ndarray, activation: int, bias: np.ndarray | None = None) -> np.ndarray:
    n, k = weight.shape
    return library.linear_nbit(
        x,
        **tensors(weight),
        bits=weight.bits,
        group=weight.group,
        n=n,
        k=k,
        activation=activation,
        **static_range(weight, activation),
        bias=bias,
        threads=1,
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("form", oracle.FORMATS, ids=str)
def test_linear_is_the_kernel_and_close_to_the_dense_product(form: oracle.Format, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 50, 200, form.bits, form.group, form.asymmetric)
    bias = RNG.standard_normal(50).astype(np.float32)
    x = RNG.standard_normal((5, 200)).astype(np.float32)
    y = session(save_linear(tmp_path / "m.onnx", weight, activation=form.activation, bias=bias)).run(None, {"x": x})[0]
    same_bits(y, direct(weight, x, form.activation, bias))
    exact = x.astype(np.float64) @ weight.dense().T + bias
    # Activations in int8 are off by up to half a level; the sum of 200 of those is far below this.
    size = np.abs(x).astype(np.float64) @ np.abs(weight.dense()).T
    assert np.all(np.abs(y - exact) <= (1e-5 if form.activation == oracle.FLOAT else 0.02) * size.max())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_optional_inputs(asymmetric: bool, with_bias: bool, constant: bool, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, asymmetric)
    bias = RNG.standard_normal(33).astype(np.float32) if with_bias else None
    x = RNG.standard_normal((3, 70)).astype(np.float32)
    feeds = {"x": x}
    if not constant:
        feeds |= tensors(weight) | ({} if bias is None else {"bias": bias})
    model = save_linear(tmp_path / "m.onnx", weight, bias=bias, constant=constant)
    same_bits(session(model).run(None, feeds)[0], direct(weight, x, 0, bias))


@pytest.mark.parametrize("leading", [(), (1,), (7,), (0,), (2, 3), (2, 0, 3), (1, 2, 1, 3)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...], tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 20, 64, 8, 64, False)
    x = RNG.standard_normal((*leading, 64)).astype(np.float32)
    names = [f"d{i}" for i in range(len(leading))]
    y = session(save_linear(tmp_path / "m.onnx", weight, activation=2, x_shape=[*names, 64])).run(None, {"x": x})[0]
    assert y.shape == (*leading, 20)
    same_bits(y, direct(weight, x, 2))


@pytest.mark.skipif(tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24), reason="no shape inference before 1.24")
def test_shape_inference_keeps_the_names_of_dimensions(tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 20, 64, 4, 64, False)
    bias = np.zeros(20, np.float32)
    path = save_linear(tmp_path / "m.onnx", weight, bias=bias, x_shape=["batch", "sequence", 64])
    assert session(path).get_outputs()[0].shape == ["batch", "sequence", 20]
    path = save_embedding(tmp_path / "e.onnx", weight, shape=["batch", 5])
    assert session(path).get_outputs()[0].shape == ["batch", 5, 64]
    path = save_linear(tmp_path / "u.onnx", weight, x_shape=[None, None, 64])
    first, second, last = session(path).get_outputs()[0].shape
    assert last == 20 and first != second, "two unknown dimensions must not look equal"


@pytest.mark.parametrize("form", [f for f in oracle.FORMATS if f.activation == oracle.FLOAT], ids=str)
def test_embedding(form: oracle.Format, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 37, 100, form.bits, form.group, form.asymmetric)
    indices = np.array([[0, 36, -1], [-37, 5, 5]], np.int64)
    y = session(save_embedding(tmp_path / "m.onnx", weight, shape=["a", "b"])).run(None, {"indices": indices})[0]
    same_bits(y, weight.dense().astype(np.float32)[indices])
    plain = np.where(indices < 0, indices + 37, indices)
    same_bits(y, library.embedding_nbit(plain, **tensors(weight), bits=form.bits, group=form.group, n=37, k=100))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_embedding_of_no_or_a_single_index(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 37, 100, 4, 32, False)
    names = [f"d{i}" for i in range(len(shape))]
    indices = np.full(shape, 3, np.int64)
    y = session(save_embedding(tmp_path / "m.onnx", weight, shape=names)).run(None, {"indices": indices})[0]
    same_bits(y, weight.dense().astype(np.float32)[indices])


@pytest.mark.parametrize("bad", [37, -38, 2**40])
def test_embedding_index_out_of_range(bad: int, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 37, 100, 4, 32, False)
    model = session(save_embedding(tmp_path / "m.onnx", weight))
    with pytest.raises(Exception, match=re.escape(f"EmbeddingNBit node '{NODE}'") + f".*{bad} at position 1"):
        model.run(None, {"indices": np.array([0, bad], np.int64)})


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_number_of_threads_does_not_change_the_result(threads: int, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 515, 384, 3, 128, True)
    x = RNG.standard_normal((9, 384)).astype(np.float32)
    same_bits(session(save_linear(tmp_path / "m.onnx", weight, activation=1), threads).run(None, {"x": x})[0],
              direct(weight, x, 1))  # fmt: skip


def test_one_session_in_many_threads(tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 260, 512, 4, 32, True)
    model = session(save_linear(tmp_path / "m.onnx", weight, activation=2))
    inputs = [RNG.standard_normal((1 + i % 5, 512)).astype(np.float32) for i in range(64)]
    expected = [direct(weight, x, 2) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for y, wanted in zip(pool.map(lambda x: model.run(None, {"x": x})[0], inputs * 5), expected * 5, strict=True):
            same_bits(y, wanted)


# ---- what does not fit is refused in words


@pytest.mark.parametrize(
    "attrs, message",
    [
        ({"bits": 5}, "attribute 'bits' is 5, expected 8, 4, 3 or 2"),
        ({"group": 48}, "attribute 'group' is 48, expected 0 (the whole row), 32, 64 or 128"),
        ({"n": 0}, "attributes 'n' and 'k' are 0 and 70"),
        ({"k": 1 << 40}, "expected 1 to 2147483647"),
        ({"activation": 4}, "attribute 'activation' is 4"),
        ({"activation": -1}, "attribute 'activation' is -1"),
        ({"layout_version": 2}, "run `qcompiler repack`"),
        ({"n": 64}, "input 1 (codes) is uint8 [3, 9, 64], expected uint8 [4, 9, 64] (bits 4, group 32, n 64, k 70)"),
    ],
)
def test_bad_attributes(attrs: dict[str, int], message: str, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    with pytest.raises(Exception, match=re.escape(f"LinearNBit node '{NODE}'") + ".*" + re.escape(message)):
        session(save_linear(tmp_path / "m.onnx", weight, **attrs))


def test_missing_attribute(tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    path = save_linear(tmp_path / "m.onnx", weight)
    model = onnx.load(path, load_external_data=False)
    kept = [a for a in model.graph.node[0].attribute if a.name != "group"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    onnx.save(model, path)
    with pytest.raises(Exception, match=f"'{NODE}': attribute 'group' is missing"):
        session(path)


BAD_TENSORS = [
    ("codes", np.zeros((3, 8, 64), np.uint8), "input 1 (codes) is uint8 [3, 8, 64], expected uint8 [3, 9, 64]"),
    ("codes", np.zeros(3 * 9 * 64, np.uint8), "input 1 (codes) is uint8 [1728], expected uint8 [3, 9, 64]"),
    ("scales", np.zeros((3, 2, 16), np.float16), "input 2 (scales) is float16 [3, 2, 16], expected float16 [3, 3, 16]"),
    ("zeros", np.zeros((3, 3, 6), np.uint8), "input 3 (zeros) is uint8 [3, 3, 6], expected uint8 [3, 3, 8]"),
    ("bias", np.zeros(32, np.float32), "input 4 (bias) is float [32], expected float [33]"),
]


@pytest.mark.parametrize("name, array, message", BAD_TENSORS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_bad_tensors(name: str, array: np.ndarray, message: str, constant: bool, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    path = save_linear(tmp_path / "m.onnx", weight, constant=constant, replace={name: array})
    with pytest.raises(Exception, match=re.escape(NODE) + ".*" + re.escape(message)):
        model = session(path)  # a constant is refused here, before any run
        if not constant:
            model.run(None, {"x": np.zeros((1, 70), np.float32), **tensors(weight), name: array})


@pytest.mark.parametrize(
    "name, array", [("codes", np.zeros((3, 9, 64), np.int8)), ("scales", np.zeros((3, 3, 16), np.float32))]
)
def test_types_are_checked_when_the_model_is_loaded(name: str, array: np.ndarray, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    with pytest.raises(Exception, match=re.escape(NODE)):
        session(save_linear(tmp_path / "m.onnx", weight, replace={name: array}))


BAD_RANGES = [
    ({"activation_scale": np.ones(2, np.float32)}, "input 5 (activation_scale) is float [2], expected float [1]"),
    ({"activation_zero": np.ones((), np.int8)}, "input 6 (activation_zero) is int8 [], expected int8 [1]"),
    ({"activation_offset": np.ones(32, np.float32)}, "input 7 (activation_offset) is float [32], expected float [33]"),
    ({"activation_scale": np.zeros(1, np.float32)}, "range.scale is 0, expected a finite number above 0"),
]


@pytest.mark.parametrize("replace, message", BAD_RANGES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_static_ranges(replace: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    path = save_linear(tmp_path / "m.onnx", weight, activation=oracle.INT8_STATIC, replace=replace)
    with pytest.raises(Exception, match=re.escape(NODE) + ".*" + re.escape(message)):
        session(path).run(None, {"x": np.zeros((1, 70), np.float32)})


def test_a_missing_static_range(tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    path = save_linear(tmp_path / "m.onnx", weight)
    model = onnx.load(path)
    next(a for a in model.graph.node[0].attribute if a.name == "activation").i = oracle.INT8_STATIC
    onnx.save(model, path)
    with pytest.raises(Exception, match=re.escape(f"{NODE}': input 5 (activation_scale) is missing")):
        session(path).run(None, {"x": np.zeros((1, 70), np.float32)})


@pytest.mark.parametrize("shape", [(2, 71), (70, 2), (3,)], ids=str)
def test_bad_activations(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = oracle.make_weight(RNG, 33, 70, 4, 32, False)
    names = [f"d{i}" for i in range(len(shape))]
    model = session(save_linear(tmp_path / "m.onnx", weight, x_shape=names))
    with pytest.raises(Exception, match=re.escape(f"{NODE}': input 0 (X) has shape") + ".*expected float.*70"):
        model.run(None, {"x": np.zeros(shape, np.float32)})


# ---- weights stay where the file is mapped


def test_the_kernel_reads_the_mapped_file(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    weight = oracle.make_weight(RNG, 512, 512, 4, 32, False)
    path = save_linear(tmp_path / "mapped.onnx", weight)
    model = session(path)
    model.run(None, {"x": np.ones((1, 512), np.float32)})
    pointer = library.load().qc_debug_last_codes_pointer()
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith("mapped.onnx.data")
    ]
    assert any(start <= pointer and pointer + weight.codes.size <= end for start, end in spans), (hex(pointer), spans)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not report RssAnon")


def test_a_large_weights_file_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    n, k = 16384, 12288
    shapes = library.weight_shapes(bits=8, group=128, n=n, k=k)
    weight = oracle.Weight(
        8, 128, np.broadcast_to(np.int64(0), (n, k)), np.empty(0), np.empty(0),
        codes=np.ones(shapes.codes, np.uint8), scales=np.ones(shapes.scales, np.float16), zeros=None,
    )  # fmt: skip
    path = save_linear(tmp_path / "large.onnx", weight, activation=2)
    del weight
    size = path.with_name("large.onnx.data").stat().st_size
    assert size > 200_000_000
    before = anonymous_bytes()
    model = session(path)
    y = model.run(None, {"x": np.ones((1, k), np.float32)})[0]
    grown = anonymous_bytes() - before
    np.testing.assert_allclose(y, k, rtol=1e-4)
    assert grown < 0.05 * size, f"session and run took {grown / 1e6:.1f} MB beside the map of {size / 1e6:.1f} MB"
