"""The op library `libqcompiler_ops`, found, loaded with ctypes and wrapped for numpy.

The same file serves ONNX Runtime (`session_options.register_custom_ops_library(str(library_path()))`) and, through the
plain C functions of `runtime/cpu/qcompiler_ops.h`, numpy and torch. Needs numpy only.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qcompiler.errors import InputError
from qcompiler.ops import layout
from qcompiler.ops.formats import LAYOUT_VERSION, AffineFormat

ABI_VERSION = 5
ACTIVATIONS = {"float": 0, "int8_token": 1, "int8_block": 2, "int8_static": 3}

_NAMES = {"darwin": "libqcompiler_ops.dylib", "win32": "libqcompiler_ops.dll"}
LIBRARY_NAME = _NAMES.get(sys.platform, "libqcompiler_ops.so")


class LibraryError(InputError):
    """The op library is missing, or not the one that this version of the package expects."""


class _Weight(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
    ]


class _Range(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float), ("zero", ctypes.c_void_p), ("offset", ctypes.c_void_p)]


class _Outliers(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("columns", ctypes.c_void_p), ("weights", ctypes.c_void_p)]


class _Edges(ctypes.Structure):
    _fields_ = [
        ("norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("residual", ctypes.c_void_p),
        ("gate", ctypes.c_int32),
    ]


class _Context(ctypes.Structure):
    _fields_ = [
        ("parallel_for", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qc_abi_version": (ctypes.c_int32, []),
    "qc_layout_version": (ctypes.c_int32, []),
    "qc_last_error": (ctypes.c_char_p, []),
    "qc_cpu_features": (ctypes.c_char_p, []),
    "qc_isas": (ctypes.c_char_p, []),
    "qc_isa": (ctypes.c_char_p, []),
    "qc_codes_bytes": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]),
    "qc_scales_count": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]),
    "qc_zeros_bytes": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]),
    "qc_vq_codes_bytes": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64] + [ctypes.c_int32] * 2),
    "qc_vq_codebook_count": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64] + [ctypes.c_int32] * 2),
    "qc_vq_codebooks_bytes": (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64] + [ctypes.c_int32] * 4),
    "qc_linear_nbit": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.POINTER(_Weight), ctypes.c_int32, ctypes.POINTER(_Range), ctypes.POINTER(_Edges)]
        + [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_linear_mixed": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.POINTER(_Weight), ctypes.c_int32, ctypes.POINTER(_Range)]
        + [ctypes.POINTER(_Outliers), ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_linear_experts_nbit": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.POINTER(_Weight), ctypes.c_int64, ctypes.c_int32, ctypes.c_int64]
        + [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_embedding_nbit": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.POINTER(_Weight), ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_linear_vq": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(_Edges), ctypes.c_int64]
        + [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_embedding_vq": (
        ctypes.c_int32,
        [ctypes.POINTER(_Context), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "qc_attention": (ctypes.c_int32, [ctypes.POINTER(_Context), ctypes.c_void_p]),
    "qc_pool_set_threads": (None, [ctypes.c_int32]),
    "qc_debug_last_codes_pointer": (ctypes.c_void_p, []),
}


# ---- where it is


def _candidates() -> list[Path]:
    """Beside this file (a wheel, or `cmake --preset native` in a checkout), and where an editable install put it."""
    places = [Path(__file__).resolve().parent / "lib" / LIBRARY_NAME]
    try:
        installed = importlib.metadata.distribution("qcompiler")
        places.append(Path(str(installed.locate_file(f"qcompiler/runtime/lib/{LIBRARY_NAME}"))).resolve())
    except importlib.metadata.PackageNotFoundError:
        pass
    return places


def library_path() -> Path:
    """The op library's file. `QCOMPILER_LIBRARY` overrides; of several builds of a checkout the newest counts."""
    if override := os.environ.get("QCOMPILER_LIBRARY"):
        if not Path(override).is_file():
            raise LibraryError(f"QCOMPILER_LIBRARY names {override!r}, which is not a file")
        return Path(override).resolve()
    places = _candidates()
    found = [place for place in places if place.is_file()]
    if not found:
        looked = "".join(f"\n  {place}" for place in dict.fromkeys(places))
        raise LibraryError(
            f"the op library {LIBRARY_NAME} is not built. Looked at:{looked}\n"
            "Build it with `pip install -e .` in the repository's root (needs CMake and a C++17 compiler), or with\n"
            "`cmake --preset native && cmake --build --preset native` in runtime/"
        )
    return max(found, key=lambda place: place.stat().st_mtime_ns)


def copy_library(directory: str | os.PathLike[str]) -> Path:
    """Copies the op library into `directory` (made if need be), for a program that ships it; returns the copy."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(library_path(), target / LIBRARY_NAME))


# ---- loading it


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library with every function's types set. Refuses one with another interface or packed layout."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"the op library {path} cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise LibraryError(f"{path} has no function {name!r}: rebuild the op library") from None
        function.restype, function.argtypes = result, arguments
    for what, found, expected in (
        ("interface", library.qc_abi_version(), ABI_VERSION),
        ("packed layout", library.qc_layout_version(), LAYOUT_VERSION),
    ):
        if found != expected:
            raise LibraryError(f"{path} has {what} version {found}, expected {expected}: rebuild the op library")
    return library


def _list(text: bytes) -> tuple[str, ...]:
    return tuple(item for item in text.decode().split(",") if item)


def cpu_features() -> tuple[str, ...]:
    """The features of this CPU that matter to the kernels."""
    return _list(load().qc_cpu_features())


def isas() -> tuple[str, ...]:
    """The instruction sets compiled in that this CPU can execute, best first."""
    return _list(load().qc_isas())


def isa() -> str:
    """The instruction set in use: the best, or what QCOMPILER_ISA asked for."""
    return load().qc_isa().decode()


def info() -> dict[str, str]:
    """What a report on this machine says about the op library."""
    return {
        "library": str(library_path()),
        "interface": str(load().qc_abi_version()),
        "packed layout": str(load().qc_layout_version()),
        "cpu features": ", ".join(cpu_features()),
        "instruction sets": ", ".join(isas()),
        "in use": isa(),
    }


# ---- calling it with raw pointers


def default_threads() -> int:
    """One thread for each CPU that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _context(library: ctypes.CDLL, threads: int | None, isa: str | None) -> _Context:
    wanted = default_threads() if threads is None else threads
    if wanted < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    context = _Context(threads=wanted, isa=None if isa is None else isa.encode())
    if wanted > 1:
        library.qc_pool_set_threads(wanted)
        context.parallel_for = ctypes.cast(library.qc_pool_parallel_for, ctypes.c_void_p)
    return context


def _call(library: ctypes.CDLL, function: Callable[..., int], *arguments: Any) -> None:
    if function(*arguments) != 0:
        raise RuntimeError(library.qc_last_error().decode())


class StaticRange(NamedTuple):
    """Addresses of activation_scale (float32 [1]), activation_zero (int8 [1]) and activation_offset (float32 [n])."""

    scale: int
    zero: int | None = None
    offset: int | None = None

    def structure(self) -> _Range:
        return _Range(ctypes.c_float.from_address(self.scale).value, self.zero, self.offset)


class Edges(NamedTuple):
    """What a linear op does besides its product: addresses of norm (float32 [k]) and residual (like y), and numbers.

    With a gate (1 silu, 2 gelu_tanh, 3 gelu) the weight has twice as many rows as y columns.
    """

    norm: int | None = None
    epsilon: float = 0.0
    residual: int | None = None
    gate: int = 0

    def structure(self) -> _Edges:
        return _Edges(*self)


def _edges(edges: Edges | None) -> Any:
    return None if edges is None else ctypes.byref(edges.structure())


def linear_nbit_pointers(
    x: int, codes: int, scales: int, zeros: int | None, bias: int | None, y: int, *, rows: int, bits: int, group: int,
    n: int, k: int, activation: int, activation_range: StaticRange | None = None, edges: Edges | None = None,
    threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """y[rows, n] = x[rows, k] . W^T (+ bias) on addresses (torch: `tensor.data_ptr()`); nothing is checked here.

    With a gate among the `edges` y is [rows, n / 2].
    """
    library = load()
    weight = _Weight(n, k, bits, group, codes, scales, zeros)
    context = _context(library, threads, isa)
    range_ = None if activation_range is None else ctypes.byref(activation_range.structure())
    arguments = (ctypes.byref(context), ctypes.byref(weight), activation, range_, _edges(edges), rows, x, bias, y)
    _call(library, library.qc_linear_nbit, *arguments)


def linear_mixed_pointers(
    x: int, codes: int, scales: int, zeros: int | None, columns: int, outliers: int, bias: int | None, y: int, *,
    count: int, rows: int, bits: int, group: int, n: int, k: int, activation: int,
    activation_range: StaticRange | None = None, threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """The same with `count` columns (int32, ascending) of x in float; the columns alone are checked."""
    library = load()
    weight = _Weight(n, k, bits, group, codes, scales, zeros)
    context = _context(library, threads, isa)
    range_ = None if activation_range is None else ctypes.byref(activation_range.structure())
    taken = ctypes.byref(_Outliers(count, columns, outliers))
    arguments = (ctypes.byref(context), ctypes.byref(weight), activation, range_, taken, rows, x, bias, y)
    _call(library, library.qc_linear_mixed, *arguments)


def linear_experts_nbit_pointers(
    x: int, expert: int, codes: int, scales: int, zeros: int | None, bias: int | None, y: int, *, rows: int, bits: int,
    group: int, experts: int, n: int, k: int, activation: int, threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """y[rows, n]: each row of x[rows, k] times the matrix of its expert, on addresses; the indices alone are checked."""
    library = load()
    weight = _Weight(n, k, bits, group, codes, scales, zeros)
    context = _context(library, threads, isa)
    arguments = (ctypes.byref(context), ctypes.byref(weight), experts, activation, rows, x, expert, bias, y)
    _call(library, library.qc_linear_experts_nbit, *arguments)


def embedding_nbit_pointers(
    indices: int, codes: int, scales: int, zeros: int | None, y: int, *, count: int, bits: int, group: int, n: int,
    k: int, threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """y[count, k] = W[indices] on addresses; indices int64 within [0, n)."""
    library = load()
    weight = _Weight(n, k, bits, group, codes, scales, zeros)
    context = _context(library, threads, isa)
    _call(library, library.qc_embedding_nbit, ctypes.byref(context), ctypes.byref(weight), count, indices, y)


# ---- calling it with numpy arrays


class WeightShapes(NamedTuple):
    """The shapes of a packed weight matrix in layout W16x4 (docs/layout.md)."""

    codes: tuple[int, int, int]
    scales: tuple[int, int, int]
    zeros: tuple[int, int, int]


def weight_shapes(*, bits: int, group: int, n: int, k: int) -> WeightShapes:
    format = AffineFormat(bits, group, symmetric=False)
    if n < 1 or k < 1:
        raise ValueError(f"n and k are {n!r} and {k!r}, expected at least 1")
    return WeightShapes(
        layout.codes_shape(n, k, bits), layout.scales_shape(n, k, format), layout.zeros_shape(n, k, format)
    )


def _checked(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...] | None = None) -> int:
    """The array's address, once it is what the kernels will take it for."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}, expected a numpy array")
    if array.dtype != dtype or (shape is not None and array.shape != shape):
        expected = "" if shape is None else f" {list(shape)}"
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)}{expected}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous in C order; use np.ascontiguousarray")
    return array.ctypes.data


def _activation(activation: int | str) -> int:
    number = ACTIVATIONS.get(activation, -1) if isinstance(activation, str) else activation
    if number not in ACTIVATIONS.values():
        raise ValueError(f"unknown activation {activation!r}, expected one of {ACTIVATIONS}")
    return number


def _checked_rows(x: np.ndarray, k: int) -> int:
    address = _checked("x", x, np.float32)
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {k}]")
    return address


def _optional(name: str, array: np.ndarray | None, dtype: type, shape: tuple[int, ...]) -> int | None:
    return None if array is None else _checked(name, array, dtype, shape)


def _checked_range(
    scale: np.ndarray | None, zero: np.ndarray | None, offset: np.ndarray | None, n: int
) -> StaticRange | None:
    if scale is None:
        if zero is not None or offset is not None:
            raise ValueError("activation_zero or activation_offset is given without activation_scale")
        return None
    return StaticRange(
        _checked("activation_scale", scale, np.float32, (1,)),
        _optional("activation_zero", zero, np.int8, (1,)),
        _optional("activation_offset", offset, np.float32, (n,)),
    )


def _checked_edges(
    gate: int, residual: np.ndarray | None, norm: np.ndarray | None, epsilon: float, x: np.ndarray, n: int, k: int
) -> tuple[Edges | None, tuple[int, ...]]:
    """The edges, None where there are none, and the shape of y; what the numbers must be the library says."""
    shape = (*x.shape[:-1], n // 2 if gate else n)
    edges = Edges(
        _optional("norm", norm, np.float32, (k,)), epsilon, _optional("residual", residual, np.float32, shape), gate
    )
    return (None if edges == Edges() else edges), shape


def _checked_weight(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, *, bits: int, group: int, n: int, k: int
) -> tuple[int, int, int | None]:
    shapes = weight_shapes(bits=bits, group=group, n=n, k=k)
    return (
        _checked("codes", codes, np.uint8, shapes.codes),
        _checked("scales", scales, np.float16, shapes.scales),
        None if zeros is None else _checked("zeros", zeros, np.uint8, shapes.zeros),
    )


def linear_nbit(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, bits: int, group: int,
    n: int, k: int, activation: int | str = "float", bias: np.ndarray | None = None,
    activation_scale: np.ndarray | None = None, activation_zero: np.ndarray | None = None,
    activation_offset: np.ndarray | None = None, residual: np.ndarray | None = None, norm: np.ndarray | None = None,
    gate: int = 0, epsilon: float = 0.0, threads: int | None = None, isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """P = x[..., k] . W^T (+ bias[n]) in float32, computed by the packed kernels; with edges what `Edges` says of it."""
    activation = _activation(activation)
    weight = _checked_weight(codes, scales, zeros, bits=bits, group=group, n=n, k=k)
    x_address = _checked_rows(x, k)
    bias_address = _optional("bias", bias, np.float32, (n,))
    range_ = _checked_range(activation_scale, activation_zero, activation_offset, n)
    edges, shape = _checked_edges(gate, residual, norm, epsilon, x, n, k)
    y = np.empty(shape, np.float32)
    if y.size:
        linear_nbit_pointers(
            x_address, *weight, bias_address, y.ctypes.data, rows=y.size // shape[-1], bits=bits, group=group, n=n, k=k,
            activation=activation, activation_range=range_, edges=edges, threads=threads, isa=isa,
        )  # fmt: skip
    return y


def linear_mixed(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, columns: np.ndarray,
    outliers: np.ndarray, bits: int, group: int, n: int, k: int, activation: int | str = "float",
    bias: np.ndarray | None = None, activation_scale: np.ndarray | None = None,
    activation_zero: np.ndarray | None = None, activation_offset: np.ndarray | None = None,
    threads: int | None = None, isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """`linear_nbit` without the outlier `columns` (int32 [o]) of x, + x[..., columns] . outliers^T."""
    activation = _activation(activation)
    weight = _checked_weight(codes, scales, zeros, bits=bits, group=group, n=n, k=k)
    x_address = _checked_rows(x, k)
    columns_address = _checked("columns", columns, np.int32, (columns.size,))
    outliers_address = _checked("outliers", outliers, np.float16, layout.outliers_shape(n, columns.size))
    bias_address = _optional("bias", bias, np.float32, (n,))
    range_ = _checked_range(activation_scale, activation_zero, activation_offset, n)
    y = np.empty((*x.shape[:-1], n), np.float32)
    if y.size:
        linear_mixed_pointers(
            x_address, *weight, columns_address, outliers_address, bias_address, y.ctypes.data, count=columns.size,
            rows=y.size // n, bits=bits, group=group, n=n, k=k, activation=activation, activation_range=range_,
            threads=threads, isa=isa,
        )  # fmt: skip
    return y


def linear_experts_nbit(
    x: np.ndarray, expert: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *,
    bits: int, group: int, experts: int, n: int, k: int, activation: int | str = "float",
    bias: np.ndarray | None = None, threads: int | None = None, isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Row i of x[rows, k] . W[expert[i]]^T (+ bias[expert[i]]) in float32, the matrices packed one after another."""
    activation = ACTIVATIONS.get(activation, -1) if isinstance(activation, str) else activation
    if experts < 1:
        raise ValueError(f"experts is {experts}, expected at least 1")
    shapes = weight_shapes(bits=bits, group=group, n=n, k=k)
    stacked = [(experts * shape[0], *shape[1:]) for shape in shapes]
    weight = (
        _checked("codes", codes, np.uint8, stacked[0]),
        _checked("scales", scales, np.float16, stacked[1]),
        None if zeros is None else _checked("zeros", zeros, np.uint8, stacked[2]),
    )
    x_address = _checked("x", x, np.float32)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [rows, {k}]")
    expert_address = _checked("expert", expert, np.int64, x.shape[:1])
    bias_address = None if bias is None else _checked("bias", bias, np.float32, (experts, n))
    y = np.empty((len(x), n), np.float32)
    if y.size:
        linear_experts_nbit_pointers(
            x_address, expert_address, *weight, bias_address, y.ctypes.data, rows=len(x), bits=bits, group=group,
            experts=experts, n=n, k=k, activation=activation, threads=threads, isa=isa,
        )  # fmt: skip
    return y


def embedding_nbit(
    indices: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, bits: int,
    group: int, n: int, k: int, threads: int | None = None, isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """The rows of W named by `indices` (int64, 0 to n - 1), decoded to float32."""
    weight = _checked_weight(codes, scales, zeros, bits=bits, group=group, n=n, k=k)
    address = _checked("indices", indices, np.int64)
    y = np.empty((*indices.shape, k), np.float32)
    if indices.size:
        embedding_nbit_pointers(
            address, *weight, y.ctypes.data, count=indices.size, bits=bits, group=group, n=n, k=k, threads=threads,
            isa=isa,
        )  # fmt: skip
    return y
