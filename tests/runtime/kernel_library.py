"""ctypes binding of the op library, on plain numpy arrays, and buffers that end at an inaccessible page."""

import ctypes
import mmap
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from tests.runtime import exercised
from tests.runtime.kernel_oracle import INT8_STATIC, STATIC_SCALE, STATIC_ZERO, Weight, static_offset

PARALLEL_FOR = ctypes.c_void_p


class QcWeight(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
    ]


class QcContext(ctypes.Structure):
    _fields_ = [
        ("parallel_for", PARALLEL_FOR),
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_char_p),
    ]


class QcRange(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float), ("zero", ctypes.c_void_p), ("offset", ctypes.c_void_p)]


class QcOutliers(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("columns", ctypes.c_void_p), ("weights", ctypes.c_void_p)]


class QcEdges(ctypes.Structure):
    _fields_ = [
        ("norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("residual", ctypes.c_void_p),
        ("gate", ctypes.c_int32),
    ]


@dataclass
class Edges:
    """What qc_linear_edges describes: norm [k], residual of the shape of y, a gate of qc_gate."""

    norm: np.ndarray | None = None
    epsilon: float = 0
    residual: np.ndarray | None = None
    gate: int = 0

    def describe(self, place, keep: list) -> QcEdges:
        norm, residual = (None if array is None else place(array) for array in (self.norm, self.residual))
        keep += [norm, residual]
        return QcEdges(_address(norm), self.epsilon, _address(residual), self.gate)


class KernelError(Exception):
    """What qc_last_error says."""


def find_library() -> pathlib.Path | None:
    if path := os.environ.get("QCOMPILER_LIBRARY"):
        return pathlib.Path(path)
    try:
        from qcompiler.runtime.library import library_path

        return pathlib.Path(library_path())
    except Exception:
        return None


class Library:
    """The C interface. Buffers are made by `place`: a copy by default, guarded memory in the guard-page test."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.c = c = ctypes.CDLL(str(path))
        for name in ("qc_last_error", "qc_cpu_features", "qc_isas", "qc_isa"):
            getattr(c, name).restype = ctypes.c_char_p
        i64, i32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
        for name, arguments in {
            "qc_codes_bytes": [i64, i64, i32],
            "qc_scales_count": [i64, i64, i32],
            "qc_zeros_bytes": [i64, i64, i32, i32],
        }.items():
            getattr(c, name).restype = i64
            getattr(c, name).argtypes = arguments
        c.qc_linear_nbit.argtypes = [pointer, pointer, i32, pointer, pointer, i64, pointer, pointer, pointer]
        c.qc_linear_mixed.argtypes = [pointer, pointer, i32, pointer, pointer, i64, pointer, pointer, pointer]
        c.qc_linear_experts_nbit.argtypes = [pointer, pointer, i64, i32, i64, pointer, pointer, pointer, pointer]
        c.qc_embedding_nbit.argtypes = [pointer, pointer, i64, pointer, pointer]
        c.qc_pool_set_threads.argtypes = [i32]
        self.isas = c.qc_isas().decode().split(",")
        self._pool = ctypes.cast(c.qc_pool_parallel_for, ctypes.c_void_p).value

    def record(self, isa: str | None, op: str, activation: int | None = None, edges: bool = False) -> None:
        exercised.record(isa or self.c.qc_isa().decode(), op, activation, edges)

    def context(self, isa: str | None = None, threads: int = 1) -> QcContext:
        return QcContext(self._pool if threads > 1 else None, None, threads, isa.encode() if isa else None)

    def describe(self, weight: Weight, place=np.array) -> tuple[QcWeight, list]:
        buffers = [place(weight.codes), place(weight.scales), None if weight.zeros is None else place(weight.zeros)]
        n, k = weight.shape
        return QcWeight(n, k, weight.bits, weight.group, *map(_address, buffers)), buffers

    def check(self, code: int) -> None:
        if code:
            raise KernelError(self.c.qc_last_error().decode())

    def linear(
        self, weight, x, activation, bias=None, *, columns=None, outliers=None, edges=None, isa=None, threads=1, place=np.array
    ) -> np.ndarray:
        """y, which lies in memory of `place` too and is filled with a pattern beforehand. With `columns`: linear_mixed.

        Static activations have the oracle's scale and zero point.
        """
        description, keep = self.describe(weight, place)
        static = None
        if activation == INT8_STATIC:
            keep += [place(np.array([STATIC_ZERO], np.int8)), place(static_offset(weight))]
            static = QcRange(STATIC_SCALE, *map(_address, keep[-2:]))
        taken = None
        if columns is not None:
            tiled = np.zeros((-(-weight.shape[0] // 16) * 16, len(columns)), np.float16)
            tiled[: weight.shape[0]] = outliers
            tiled = np.ascontiguousarray(tiled.reshape(-1, 16, len(columns)).transpose(0, 2, 1))
            keep += [place(np.asarray(columns, np.int32)), place(tiled)]
            taken = QcOutliers(len(columns), *map(_address, keep[-2:]))
        rows, n = x.shape[0], weight.shape[0]
        x = place(x)
        bias = None if bias is None else place(bias)
        y = place(np.full((rows, n // 2 if edges and edges.gate else n), -7.0, np.float32))
        context = self.context(isa, threads)
        around = edges.describe(place, keep) if edges else None
        before = [ctypes.addressof(context), ctypes.addressof(description), activation]
        before.append(ctypes.addressof(static) if static else None)
        after = (rows, _address(x), _address(bias), _address(y))
        if taken is None:
            self.check(self.c.qc_linear_nbit(*before, ctypes.addressof(around) if around else None, *after))
        else:
            self.check(self.c.qc_linear_mixed(*before, ctypes.addressof(taken), *after))
        self.record(isa, "linear" if taken is None else "mixed", activation, bool(edges))
        del keep
        return y

    def experts(self, weights, x, expert, activation, bias=None, *, isa=None, threads=1, place=np.array) -> np.ndarray:
        """linear_experts_nbit: row i of x times weights[expert[i]]; all have one shape and format. bias [experts, n]."""
        first = weights[0]
        tensors = [[getattr(weight, name) for weight in weights] for name in ("codes", "scales", "zeros")]
        keep = [None if parts[0] is None else place(np.concatenate(parts)) for parts in tensors]
        description = QcWeight(*first.shape, first.bits, first.group, *map(_address, keep))
        x, expert = place(x), place(np.asarray(expert, np.int64))
        bias = None if bias is None else place(bias)
        y = place(np.full((len(x), first.shape[0]), -7.0, np.float32))
        context = self.context(isa, threads)
        pointers = [ctypes.addressof(context), ctypes.addressof(description)]
        values = (_address(array) for array in (x, expert, bias, y))
        self.check(self.c.qc_linear_experts_nbit(*pointers, len(weights), activation, len(x), *values))
        self.record(isa, "experts", activation)
        del keep
        return y

    def embedding(self, weight, indices, *, isa=None, threads=1, place=np.array) -> np.ndarray:
        description, keep = self.describe(weight, place)
        indices = place(np.asarray(indices, np.int64))
        y = place(np.full((len(indices), weight.shape[1]), -7.0, np.float32))
        context = self.context(isa, threads)
        self.check(
            self.c.qc_embedding_nbit(
                ctypes.addressof(context), ctypes.addressof(description), len(indices), _address(indices), _address(y)
            )
        )
        exercised.record("generic", "embedding")
        del keep
        return y


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None or array.size == 0 else array.ctypes.data


class GuardedMemory:
    """Arrays whose last (or first) byte lies against a page that no one may touch."""

    PROT_NONE = 0

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self._maps = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        inner = max(page, -(-array.nbytes // page) * page)
        pages = mmap.mmap(-1, inner + 2 * page)
        self._maps.append(pages)
        base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for guard in (base, base + page + inner):
            if self._libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), self.PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = page + (inner - array.nbytes if self.at_end else 0)
        out = np.frombuffer(pages, array.dtype, array.size, offset).reshape(array.shape)
        out[...] = array
        return out
