"""The ctypes face: found, checked, and strict about what it is given."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompiler.ops.formats import BITS, GROUPS
from qcompiler.runtime import library
from tests.runtime import kernel_oracle as oracle
from tests.runtime.ort_models import tensors

RNG = np.random.default_rng(3)


def test_info_names_the_library_and_the_instruction_set_in_use() -> None:
    info = library.info()
    assert Path(info["library"]).is_file()
    assert library.isa() in library.isas() and "generic" in library.isas()
    assert info["in use"] == library.isa()


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("threads", [1, 2, None])
def test_linear_to_the_bit(isa: str, threads: int | None) -> None:
    weight = oracle.make_weight(RNG, 40, 150, 4, 64, True)
    bias = RNG.standard_normal(40).astype(np.float32)
    x = RNG.standard_normal((2, 3, 150)).astype(np.float32)
    y = library.linear_nbit(
        x,
        **tensors(weight),
        bits=4,
        group=64,
        n=40,
        k=150,
        activation="int8_block",
        bias=bias,
        threads=threads,
        isa=isa,
    )
    expected = oracle.linear(weight, x.reshape(6, 150), oracle.INT8_BLOCK, bias).reshape(2, 3, 40)
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


def test_embedding_to_the_bit() -> None:
    weight = oracle.make_weight(RNG, 40, 150, 3, 32, True)
    indices = np.array([[39, 0], [7, 7]])
    y = library.embedding_nbit(indices, **tensors(weight), bits=3, group=32, n=40, k=150)
    np.testing.assert_array_equal(y, weight.dense().astype(np.float32)[indices])


def test_raw_pointers() -> None:
    weight = oracle.make_weight(RNG, 16, 32, 8, 0, False)
    x = RNG.standard_normal((1, 32)).astype(np.float32)
    y = np.empty((1, 16), np.float32)
    library.linear_nbit_pointers(
        x.ctypes.data, weight.codes.ctypes.data, weight.scales.ctypes.data, None, None, y.ctypes.data,
        rows=1, bits=8, group=0, n=16, k=32, activation=0,
    )  # fmt: skip
    np.testing.assert_array_equal(y, oracle.linear(weight, x, 0, None))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n, k", [(1, 1), (16, 32), (17, 33), (1000, 4096), (31, 129)])
def test_shapes_hold_what_the_kernels_read(bits: int, group: int, n: int, k: int) -> None:
    shapes = library.weight_shapes(bits=bits, group=group, n=n, k=k)
    lib = library.load()
    assert np.prod(shapes.codes) == lib.qc_codes_bytes(n, k, bits)
    assert np.prod(shapes.scales) == lib.qc_scales_count(n, k, group)
    assert np.prod(shapes.zeros) == lib.qc_zeros_bytes(n, k, bits, group)


def call(x: np.ndarray | None = None, **changed: object) -> np.ndarray:
    weight = oracle.make_weight(np.random.default_rng(0), 40, 150, 4, 64, False)
    arguments = tensors(weight) | {"bits": 4, "group": 64, "n": 40, "k": 150} | changed
    return library.linear_nbit(np.zeros((2, 150), np.float32) if x is None else x, **arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"codes": np.zeros((3, 18, 64), np.uint8)}, r"codes is uint8 \[3, 18, 64\], expected uint8 \[3, 19, 64\]"),
        ({"codes": np.zeros((3, 64, 19), np.uint8).transpose(0, 2, 1)}, "codes is not contiguous"),
        ({"scales": np.zeros((3, 3, 16), np.float32)}, r"scales is float32 \[3, 3, 16\], expected float16"),
        ({"zeros": np.zeros((3, 3, 7), np.uint8)}, r"zeros is uint8 \[3, 3, 7\], expected uint8 \[3, 3, 8\]"),
        ({"bias": np.zeros(40)}, r"bias is float64 \[40\], expected float32 \[40\]"),
        ({"bits": 5}, "bits must be one of"),
        ({"group": 16}, "group must be one of"),
        ({"n": 0}, "n and k are 0 and 150"),
        ({"activation": "int4"}, "unknown activation"),
        ({"activation": 7}, "unknown activation"),
        ({"threads": 0}, "threads is 0"),
        ({"x": np.zeros((2, 149), np.float32)}, r"x has shape \[2, 149\], expected \[..., 150\]"),
        ({"x": np.zeros((150, 2), np.float32).T}, "x is not contiguous"),
        ({"x": np.zeros((2, 150))}, "x is float64"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_errors_of_the_kernels_arrive_in_words() -> None:
    with pytest.raises(RuntimeError, match="isa"):
        call(isa="no-such-isa")
    weight = oracle.make_weight(RNG, 40, 150, 4, 64, False)
    with pytest.raises(RuntimeError, match="40"):
        library.embedding_nbit(np.array([40]), **tensors(weight), bits=4, group=64, n=40, k=150)


def test_copy_library(tmp_path: Path) -> None:
    copy = library.copy_library(tmp_path / "new" / "place")
    assert copy.name == library.LIBRARY_NAME
    assert copy.read_bytes() == library.library_path().read_bytes()
    assert ctypes.CDLL(str(copy)).qc_abi_version() == library.ABI_VERSION


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QCOMPILER_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_candidates", lambda: [tmp_path / library.LIBRARY_NAME])
    with pytest.raises(library.LibraryError, match=r"not built(.|\n)*pip install -e \."):
        library.library_path()
    monkeypatch.setenv("QCOMPILER_LIBRARY", str(tmp_path / "nowhere.so"))
    with pytest.raises(library.LibraryError, match=r"QCOMPILER_LIBRARY names .*nowhere\.so"):
        library.library_path()


def test_the_override_and_a_library_of_another_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    monkeypatch.setenv("QCOMPILER_LIBRARY", str(other))
    library.load.cache_clear()
    try:
        with pytest.raises(library.LibraryError, match="cannot be loaded"):
            library.load()
    finally:
        library.load.cache_clear()


def test_the_newest_build_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.delenv("QCOMPILER_LIBRARY", raising=False)
    places = [tmp_path / "a.so", tmp_path / "b.so"]
    for age, place in enumerate(places):
        place.touch()
        os.utime(place, (1000 - age, 1000 - age))
    monkeypatch.setattr(library, "_candidates", lambda: places)
    assert library.library_path() == places[0]


def test_exports_are_ours_alone() -> None:
    if sys.platform != "linux" or not shutil.which("nm"):
        pytest.skip("needs nm")
    table = subprocess.run(
        ["nm", "-D", "--defined-only", library.library_path()], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in table.stdout.splitlines()}
    assert "RegisterCustomOps" in names
    assert all(name == "RegisterCustomOps" or name.startswith("qc_") for name in names), names


def test_torch_is_not_imported() -> None:
    code = "import sys, qcompiler.runtime.library as l; l.load(); print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_onnx_runtime_that_is_too_old_is_told_so() -> None:
    """A stand-in for the API table of an ONNX Runtime that knows version 1 but not 17."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)
    messages: list[bytes] = []
    version = ctypes.create_string_buffer(b"1.12.1")

    @create_status
    def create(code: int, message: bytes) -> int:
        messages.append(message)
        return 0x1234

    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))

    class Base(ctypes.Structure):
        _fields_ = [("get_api", get_api), ("get_version", get_version)]

    base = Base(
        get_api(lambda wanted: ctypes.addressof(table) if wanted == 1 else None),
        get_version(lambda: ctypes.addressof(version)),
    )
    register = ctypes.CDLL(str(library.library_path())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.byref(base)) == 0x1234
    assert messages == [b"qcompiler: this is ONNX Runtime 1.12.1, the op library needs 1.17 or later"]
