"""llama.cpp's CPU kernels, called in the shared libraries that llama-cpp-python brings, repacked at load as llama.cpp does."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.kernel_peers import weights
from tools.bench.kernels_side import Case, Opened, Skipped

# Numbers of enum ggml_type, which are part of its file format.
TYPES = {"q4_0": 2, "q8_0": 8, "q2_k": 10, "q4_k": 12, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq3_s": 21}
F32 = 0
ERROR = 4  # of enum ggml_log_level

_P, _I, _L, _Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buft_get_alignment": (_Z, [_P]),
    "ggml_backend_buft_get_alloc_size": (_Z, [_P, _P]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_dev_buffer_type": (_P, [_P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_reg_dev_get": (_P, [_P, _Z]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_tensor_alloc": (_I, [_P, _P, _P]),
    "ggml_backend_tensor_get": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_tensor_set": (None, [_P, _P, _Z, _Z]),
    "ggml_blck_size": (_L, [_I]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_free": (None, [_P]),
    "ggml_get_type_traits": (_P, [_I]),
    "ggml_graph_overhead": (_Z, []),
    "ggml_log_set": (None, [_LOG, _P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_nbytes": (_Z, [_P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_quantize_chunk": (_Z, [_I, _P, _P, _L, _L, _L, _P]),
    "ggml_row_size": (_Z, [_I, _L]),
    "ggml_tensor_overhead": (_Z, []),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
}
LARGEST_GRAPH = 2048  # nodes of ggml_new_graph


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Ggml:
    """The functions of libggml-base and libggml-cpu that are used here."""

    def __init__(self, folder: Path) -> None:
        self.base, self.cpu = (ctypes.CDLL(str(_library(folder, name))) for name in ("ggml-base", "ggml-cpu"))
        for library, functions in ((self.base, _BASE), (self.cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                try:
                    function = getattr(library, name)
                except AttributeError:
                    raise Skipped(f"its ggml has no function {name}") from None
                function.restype, function.argtypes = result, arguments
        self.base.ggml_init.restype, self.base.ggml_init.argtypes = _P, [_InitParams]
        self._log = _LOG(_say)  # called as long as the library lives
        self.base.ggml_log_set(self._log, None)
        register = self.cpu.ggml_backend_cpu_reg()
        self.device = self.base.ggml_backend_reg_dev_get(register, 0)
        extra = self.base.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(extra)(self.device) if extra else None
        # Those of repacked weights in llama.cpp's order, then plain memory.
        self.buffer_types: list[int] = []
        while found and (kind := found[len(self.buffer_types)]):
            self.buffer_types.append(kind)
        self.plain = self.base.ggml_backend_dev_buffer_type(self.device)
        self.buffer_types.append(self.plain)


def _say(level: int, text: bytes, _: int | None) -> None:
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def _library(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"*{name}.*"))
    if not found:
        raise Skipped(f"llama-cpp-python has no library {name} in {folder}")
    return found[0]


@functools.cache
def ggml() -> Ggml:
    """Loaded once; the Python package itself is not imported."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise Skipped("not installed: llama-cpp-python")
    return Ggml(Path(found.origin).parent / "lib")


@dataclass(frozen=True)
class Llama:
    """ggml_mul_mat with weights of a ggml type, every matrix a node of one graph that reads the same activations."""

    type_name: str
    family: str = "llama.cpp"

    @property
    def name(self) -> str:
        return f"llama-{self.type_name}"

    def open(self, case: Case) -> Opened:
        ready = ggml()
        type = TYPES[self.type_name]
        weights.need_multiple(case, ready.base.ggml_blck_size(type))
        matrix_bytes = case.n * ready.base.ggml_row_size(type, case.k)
        matrices = case.count(matrix_bytes)
        if matrices > LARGEST_GRAPH:
            raise Skipped(f"{matrices} matrices in a graph, its largest has {LARGEST_GRAPH} nodes")
        some = self._quantized(ready.base, case)
        graph = _Graph(ready, case, type, matrices, np.resize(some, (case.n, some.shape[1])))

        def product() -> tuple[np.ndarray, np.ndarray]:
            rows = np.empty((len(some), case.k), np.float32)
            traits = _TypeTraits.from_address(ready.base.ggml_get_type_traits(type))
            traits.to_float(some.ctypes.data, rows.ctypes.data, rows.size)
            return graph.first()[:, : len(some)], case.x() @ rows.T

        return Opened(graph.compute, matrices, matrix_bytes, product, graph.close)

    def _quantized(self, base: ctypes.CDLL, case: Case) -> np.ndarray:
        """The first rows, quantized by ggml: uint8 `[rows, row bytes]`. A matrix repeats them, which costs what others would."""
        type, rows = TYPES[self.type_name], weights.checked_rows(case.n)
        values = weights.generator(0).standard_normal((rows, case.k), np.float32) / np.float32(case.k**0.5)
        importance = np.ones(case.k, np.float32)  # types of two bits ask for it
        packed = np.empty((rows, base.ggml_row_size(type, case.k)), np.uint8)
        base.ggml_quantize_chunk(type, values.ctypes.data, packed.ctypes.data, 0, rows, case.k, importance.ctypes.data)
        return packed


class _Graph:
    """y_i = W_i · x for every i, in memory of its own."""

    def __init__(self, ready: Ggml, case: Case, type: int, matrices: int, packed: np.ndarray) -> None:
        self._base, self._case = ready.base, case
        self._buffers: list[int] = []
        self._contexts: list[int] = []
        self._backend = ready.cpu.ggml_backend_cpu_init()
        ready.cpu.ggml_backend_cpu_set_n_threads(self._backend, case.threads)
        for kind in ready.buffer_types:
            if kind == ready.plain or self._supported(ready, kind, type):
                break
        self.repacked = kind != ready.plain
        base, context = self._base, self._context(2 * matrices + 1)
        x = base.ggml_new_tensor_2d(context, F32, case.k, case.rows)
        weights = [base.ggml_new_tensor_2d(context, type, case.k, case.n) for _ in range(matrices)]
        self._results = [base.ggml_mul_mat(context, weight, x) for weight in weights]
        self._place(kind, weights)
        self._place(ready.plain, [x, *self._results])
        for weight in weights:
            base.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        values = case.x()
        base.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        self._graph = base.ggml_new_graph(context)
        for result in self._results:
            base.ggml_build_forward_expand(self._graph, result)

    def compute(self) -> None:
        if status := self._base.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError(f"ggml_backend_graph_compute gave status {status}")

    def first(self) -> np.ndarray:
        """Result of the first matrix, float32 `[rows, n]`."""
        self.compute()
        found = np.empty((self._case.rows, self._case.n), np.float32)
        self._base.ggml_backend_tensor_get(self._results[0], found.ctypes.data, 0, found.nbytes)
        return found

    def close(self) -> None:
        for buffer in self._buffers:
            self._base.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self._base.ggml_free(context)
        self._base.ggml_backend_free(self._backend)

    def _context(self, tensors: int) -> int:
        size = tensors * self._base.ggml_tensor_overhead() + self._base.ggml_graph_overhead()
        self._contexts.append(self._base.ggml_init(_InitParams(size, None, True)))
        return self._contexts[-1]

    def _supported(self, ready: Ggml, kind: int, type: int) -> bool:
        """Whether the CPU multiplies with a weight in that kind of memory: the question that llama.cpp's loader asks."""
        base, context = self._base, self._context(3)
        x = base.ggml_new_tensor_2d(context, F32, self._case.k, self._case.rows)
        weight = base.ggml_new_tensor_2d(context, type, self._case.k, self._case.n)
        product = base.ggml_mul_mat(context, weight, x)
        self._place(kind, [weight])
        found = base.ggml_backend_dev_supports_op(ready.device, product)
        base.ggml_backend_buffer_free(self._buffers.pop())
        return found

    def _place(self, kind: int, tensors: list[int]) -> None:
        """Gives tensors memory of that kind, one buffer for all."""
        base, step = self._base, self._base.ggml_backend_buft_get_alignment(kind)
        sizes = [-(-base.ggml_backend_buft_get_alloc_size(kind, tensor) // step) * step for tensor in tensors]
        buffer = base.ggml_backend_buft_alloc_buffer(kind, sum(sizes))
        if not buffer:
            raise Skipped(f"its allocator has no {sum(sizes):,} bytes")
        self._buffers.append(buffer)
        at = base.ggml_backend_buffer_get_base(buffer)
        for tensor, size in zip(tensors, sizes, strict=True):
            base.ggml_backend_tensor_alloc(buffer, tensor, at)
            at += size


SIDES = tuple(Llama(name) for name in TYPES)
