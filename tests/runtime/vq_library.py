"""The C functions of vector-quantized matrices on plain numpy arrays (see kernel_library.py)."""

import ctypes

import numpy as np

from tests.runtime import exercised
from tests.runtime.kernel_library import Library, _address
from tests.runtime.vq_oracle import VqWeight


class QcVqWeight(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("dim", ctypes.c_int32),
        ("centroids", ctypes.c_int32),
        ("block_rows", ctypes.c_int32),
        ("block_columns", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("codebooks", ctypes.c_void_p),
        ("codebook_scales", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


class VqLibrary(Library):
    def __init__(self, path):
        super().__init__(path)
        i64, i32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
        for name, arguments in {
            "qc_vq_codes_bytes": [i64, i64, i32, i32],
            "qc_vq_codebook_count": [i64, i64, i32, i32],
            "qc_vq_codebooks_bytes": [i64, i64, i32, i32, i32, i32],
        }.items():
            getattr(self.c, name).restype = i64
            getattr(self.c, name).argtypes = arguments
        self.c.qc_linear_vq.argtypes = [pointer, pointer, i32, pointer, i64, pointer, pointer, pointer]
        self.c.qc_embedding_vq.argtypes = [pointer, pointer, i64, pointer, pointer]

    def describe_vq(self, weight: VqWeight, place=np.array) -> tuple[QcVqWeight, list]:
        buffers = [place(t) for t in (weight.codes, weight.codebooks, weight.codebook_scales, weight.scales)]
        form = weight.form
        numbers = form.dim, form.centroids, form.block_rows, form.block_columns, form.group
        return QcVqWeight(*weight.shape, *numbers, *map(_address, buffers)), buffers

    def linear_vq(
        self, weight, x, activation, bias=None, *, edges=None, isa=None, threads=1, place=np.array
    ) -> np.ndarray:
        """y, which lies in memory of `place` too and is filled with a pattern beforehand."""
        description, keep = self.describe_vq(weight, place)
        rows = len(x)
        x, bias = place(x), None if bias is None else place(bias)
        y = place(np.full((rows, weight.shape[0] // (2 if edges and edges.gate else 1)), -7.0, np.float32))
        context = self.context(isa, threads)
        at = ctypes.addressof
        around = edges.describe(place, keep) if edges else None
        before = at(context), at(description), activation, at(around) if around else None
        self.check(self.c.qc_linear_vq(*before, rows, _address(x), _address(bias), _address(y)))
        self.record(isa, "vq", activation, bool(edges))
        del keep
        return y

    def embedding_vq(self, weight, indices, *, isa=None, threads=1, place=np.array) -> np.ndarray:
        description, keep = self.describe_vq(weight, place)
        indices = place(np.asarray(indices, np.int64))
        y = place(np.full((len(indices), weight.shape[1]), -7.0, np.float32))
        context = self.context(isa, threads)
        at = ctypes.addressof
        self.check(self.c.qc_embedding_vq(at(context), at(description), len(indices), _address(indices), _address(y)))
        exercised.record("generic", "embedding-vq")
        del keep
        return y
