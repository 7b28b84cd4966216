"""The op library's functions for vector-quantized matrices, wrapped like those of `library.py`. Needs numpy only."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from qcompiler.ops import vq_layout
from qcompiler.ops.formats import VqFormat
from qcompiler.runtime import library


class VqWeight(ctypes.Structure):
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


# ---- with raw pointers


def linear_vq_pointers(
    x: int, codes: int, codebooks: int, codebook_scales: int, scales: int, bias: int | None, y: int, *, rows: int,
    dim: int, centroids: int, block_rows: int, block_columns: int, group: int, n: int, k: int, activation: int,
    edges: library.Edges | None = None, threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """y[rows, n] = x[rows, k] . W^T (+ bias), W vector-quantized, on addresses; nothing is checked here."""
    lib = library.load()
    tensors = codes, codebooks, codebook_scales, scales
    weight = VqWeight(n, k, dim, centroids, block_rows, block_columns, group, *tensors)
    context = library._context(lib, threads, isa)
    before = ctypes.byref(context), ctypes.byref(weight), activation, library._edges(edges)
    library._call(lib, lib.qc_linear_vq, *before, rows, x, bias, y)


def embedding_vq_pointers(
    indices: int, codes: int, codebooks: int, codebook_scales: int, scales: int, y: int, *, count: int, dim: int,
    centroids: int, block_rows: int, block_columns: int, group: int, n: int, k: int, threads: int | None = None,
    isa: str | None = None,
) -> None:  # fmt: skip
    """y[count, k] = W[indices], W vector-quantized, on addresses; indices int64 within [0, n)."""
    lib = library.load()
    tensors = codes, codebooks, codebook_scales, scales
    weight = VqWeight(n, k, dim, centroids, block_rows, block_columns, group, *tensors)
    context = library._context(lib, threads, isa)
    library._call(lib, lib.qc_embedding_vq, ctypes.byref(context), ctypes.byref(weight), count, indices, y)


# ---- with numpy arrays


class VqShapes(NamedTuple):
    """The shapes of a packed vector-quantized matrix (docs/layout.md)."""

    codes: tuple[int, int, int]
    codebooks: tuple[int, int, int, int]
    codebook_scales: tuple[int, int]
    scales: tuple[int, int, int]


def vq_shapes(
    *, dim: int, centroids: int, block_rows: int, block_columns: int, group: int, n: int, k: int
) -> VqShapes:
    format = VqFormat(dim, centroids, block_rows, block_columns, group)
    if n < 1 or k < 1:
        raise ValueError(f"n and k are {n!r} and {k!r}, expected at least 1")
    return VqShapes(
        vq_layout.codes_shape(n, k, format),
        vq_layout.codebooks_shape(n, k, format),
        format.blocks(n, k),
        vq_layout.scales_shape(n, k, format),
    )


def _checked_vq(
    codes: np.ndarray, codebooks: np.ndarray, codebook_scales: np.ndarray, scales: np.ndarray, shapes: VqShapes
) -> tuple[int, int, int, int]:
    return (
        library._checked("codes", codes, np.uint8, shapes.codes),
        library._checked("codebooks", codebooks, np.int8, shapes.codebooks),
        library._checked("codebook_scales", codebook_scales, np.float16, shapes.codebook_scales),
        library._checked("scales", scales, np.float16, shapes.scales),
    )


def linear_vq(
    x: np.ndarray, codes: np.ndarray, codebooks: np.ndarray, codebook_scales: np.ndarray, scales: np.ndarray, *,
    dim: int, centroids: int, block_rows: int, block_columns: int, group: int, n: int, k: int,
    activation: int | str = "float", bias: np.ndarray | None = None, residual: np.ndarray | None = None,
    norm: np.ndarray | None = None, gate: int = 0, epsilon: float = 0.0, threads: int | None = None,
    isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """P = x[..., k] . W^T (+ bias[n]) in float32, W vector-quantized, and its edges (`library.Edges`).

    `activation`: float or int8_block.
    """
    form = {"dim": dim, "centroids": centroids, "block_rows": block_rows, "block_columns": block_columns}
    sizes = {**form, "group": group, "n": n, "k": k}
    activation = library._activation(activation)
    weight = _checked_vq(codes, codebooks, codebook_scales, scales, vq_shapes(**sizes))
    x_address = library._checked_rows(x, k)
    bias_address = library._optional("bias", bias, np.float32, (n,))
    edges, shape = library._checked_edges(gate, residual, norm, epsilon, x, n, k)
    y = np.empty(shape, np.float32)
    if y.size:
        linear_vq_pointers(
            x_address, *weight, bias_address, y.ctypes.data, rows=y.size // shape[-1], activation=activation,
            edges=edges, threads=threads, isa=isa, **sizes,
        )  # fmt: skip
    return y


def embedding_vq(
    indices: np.ndarray, codes: np.ndarray, codebooks: np.ndarray, codebook_scales: np.ndarray, scales: np.ndarray, *,
    dim: int, centroids: int, block_rows: int, block_columns: int, group: int, n: int, k: int,
    threads: int | None = None, isa: str | None = None,
) -> np.ndarray:  # fmt: skip
    """The rows of a vector-quantized W named by `indices` (int64, 0 to n - 1), decoded to float32."""
    form = {"dim": dim, "centroids": centroids, "block_rows": block_rows, "block_columns": block_columns}
    sizes = {**form, "group": group, "n": n, "k": k}
    weight = _checked_vq(codes, codebooks, codebook_scales, scales, vq_shapes(**sizes))
    address = library._checked("indices", indices, np.int64)
    y = np.empty((*indices.shape, k), np.float32)
    if indices.size:
        embedding_vq_pointers(address, *weight, y.ctypes.data, count=indices.size, threads=threads, isa=isa, **sizes)
    return y
