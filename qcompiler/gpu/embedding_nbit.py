"""`embedding_nbit` on a GPU: a program decodes a part of one row, to the bits of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.errors import InputError
from qcompiler.gpu import device, dispatch
from qcompiler.gpu.codes import EXPONENT, WORD_COLUMNS, expand, load_scales, load_words, load_zeros
from qcompiler.gpu.weight import Weight, packed


@triton.jit(do_not_specialize=("n", "row_words", "groups"))
def _rows(
    index_ptr, words_ptr, scales_ptr, zeros_ptr, y_ptr, n, k, row_words, groups, exponent,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORD_K: tl.constexpr, SYMMETRIC: tl.constexpr, CENTER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_K
    index = tl.load(index_ptr + item)
    line = tl.zeros([1], tl.int64) + tl.where(index < 0, index + n, index)
    known = (line >= 0) & (line < n)
    V: tl.constexpr = BLOCK_K // WORD_K
    words = load_words(words_ptr, line, known, at // WORD_K, row_words, V, BITS, False)
    codes = expand(words, tl.zeros([1, 1], tl.int32), exponent, V, 1, BITS, WORD_K, tl.float32)
    columns = (at + tl.arange(0, BLOCK_K))[None, :]
    if GROUP == 0:
        group = columns * 0
    else:
        group = columns // GROUP
    inside = known[:, None] & (columns < k)
    if SYMMETRIC:
        minus = tl.full([1, BLOCK_K], CENTER, tl.int32)
    else:
        minus = load_zeros(zeros_ptr, line[:, None], groups, group, inside, BITS)
    value = (codes - minus.to(tl.float32)) * load_scales(scales_ptr, line[:, None], groups, group, inside)
    tl.store(y_ptr + item * k + columns, value, mask=columns < k)


def check_indices(op: str, indices: torch.Tensor, n: int) -> None:
    """Stops the program where an index is outside `[-n, n)`: on a GPU without waiting, as torch's own indexing does.

    Raises:
        InputError: indices that are no int64.
        RuntimeError: an index outside; on a GPU at the next synchronization.
    """
    if indices.dtype != torch.int64:
        raise InputError(f"{op}: indices are {indices.dtype}, expected torch.int64")
    torch._assert_async(((indices >= -n) & (indices < n)).all(), f"{op}: an index is outside [{-n}, {n})")


def embedding_nbit(indices, codes, scales, zeros, bits, group, n, k, layout_version):
    """CUDA implementation of `qcompiler::embedding_nbit`: float32 `[..., k]`; negative indices count from the end.

    Raises:
        InputError, UnsupportedError, RuntimeError: as `linear_nbit` and `check_indices`.
    """
    op = "embedding_nbit"
    device.require(indices.device, op, torch.float32)
    weight: Weight = packed(op, codes, scales, zeros, bits, group, n, k, indices.device)
    check_indices(op, indices, n)
    y = torch.empty((*indices.shape, k), dtype=torch.float32, device=indices.device)
    if not y.numel():
        return y
    config = dispatch.choose(
        op, format=weight.format.label, activation="float", dtype="float32", rows=indices.numel(), outputs=n, inputs=k,
        device=device.name(indices.device),
    ).config  # fmt: skip
    block = config["block_k"]
    with device.on(indices.device):
        _rows[(indices.numel(), triton.cdiv(k, block))](
            indices.contiguous(), weight.words, weight.scales, weight.zeros, y, n, k, weight.row_words, weight.groups, EXPONENT,
            BITS=bits, GROUP=group, WORD_K=WORD_COLUMNS[bits], SYMMETRIC=zeros is None, CENTER=weight.center,
            BLOCK_K=block, num_warps=config["warps"],
        )  # fmt: skip
    return y
