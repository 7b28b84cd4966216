"""Many rows of x: the weight is decoded into a scratch, and the library's matrix product takes it from there.

The scratch holds some rows of the weight at a time (`chunk` bytes in the configuration), so that it can stay in the cache; 0
is all of them. For int8 weights with one scale a row the scratch is their integers, and the product `torch._int_mm`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device
from qcompiler.gpu.codes import EXPONENT, WORD_COLUMNS, expand, load_scales, load_words, load_zeros
from qcompiler.gpu.weight import Weight
from qcompiler.ops.formats import TILE

BLOCK_N, BLOCK_K = 32, 128
INT_MM_ROWS = 17  # that torch._int_mm takes at least
INT_MM_COLUMNS = 16  # of which its operands have a multiple


@triton.jit(do_not_specialize=("last", "row_words", "groups"))
def _dequantize(
    words_ptr, scales_ptr, zeros_ptr, out_ptr, first, last, k, stride, row_words, groups, exponent,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORD_K: tl.constexpr, SYMMETRIC: tl.constexpr, CENTER: tl.constexpr,
    INTEGER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = first + local.to(tl.int64)
    mask = lines < last
    V: tl.constexpr = BLOCK_K // WORD_K
    at = tl.program_id(1) * BLOCK_K
    words = load_words(words_ptr, lines, mask, at // WORD_K, row_words, V, BITS, False)
    nothing = tl.zeros([1, BLOCK_N], tl.int32)
    columns = at + tl.arange(0, BLOCK_K)
    target = out_ptr + (local.to(tl.int64) * stride)[:, None] + columns[None, :]
    if INTEGER:
        values = expand(words, nothing + CENTER, exponent, V, BLOCK_N, BITS, WORD_K, tl.int8)
        values = tl.where((columns < k)[None, :], values, 0)
    else:
        if GROUP == 0:
            group = tl.zeros([1, BLOCK_K], tl.int32)
        else:
            group = (columns // GROUP)[None, :]
        inside = mask[:, None] & (group < groups)
        if SYMMETRIC:
            minus = tl.full([BLOCK_N, 1], CENTER, tl.int32)
        else:
            minus = load_zeros(zeros_ptr, lines[:, None], groups, group, inside, BITS)
        scale = load_scales(scales_ptr, lines[:, None], groups, group, inside)
        codes = expand(words, nothing, exponent, V, BLOCK_N, BITS, WORD_K, tl.float32)
        values = ((codes - minus.to(tl.float32)) * scale).to(out_ptr.dtype.element_ty)
    tl.store(target, values, mask=mask[:, None] & (columns < stride)[None, :])


def dequantize(weight: Weight, first: int, last: int, stride: int, out: torch.Tensor) -> None:
    """Rows `first` … `last - 1` of all tiles into `out` `[last - first, stride]`: W, or its integers where out is int8.

    What lies beyond k is 0 in integers; in a float scratch the stride is k.
    """
    bits = weight.format.bits
    grid = (triton.cdiv(last - first, BLOCK_N), triton.cdiv(stride, BLOCK_K))
    with device.on(out.device):
        _dequantize[grid](
            weight.words, weight.scales, weight.zeros, out, first, last, weight.k, stride, weight.row_words,
            weight.groups, EXPONENT,
            BITS=bits, GROUP=weight.format.group, WORD_K=WORD_COLUMNS[bits], SYMMETRIC=weight.zeros is None,
            CENTER=weight.center, INTEGER=out.dtype == torch.int8, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip


def _chunks(rows: int, row_bytes: int, chunk: int) -> list[tuple[int, int]]:
    step = rows if chunk == 0 else max(1, chunk // (row_bytes * TILE)) * TILE
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def matmul(x: torch.Tensor, weight: Weight, config: Mapping[str, int]) -> torch.Tensor:
    """x `[rows, k]` times the decoded weight, in the dtype of x: `[1, rows, n]`."""
    y = x.new_empty((1, x.shape[0], weight.n))
    chunks = _chunks(weight.n, weight.k * x.element_size(), config["chunk"])
    scratch = x.new_empty((chunks[0][1], weight.k))
    for first, last in chunks:
        part = scratch[: last - first]
        dequantize(weight, first, last, weight.k, part)
        torch.mm(x, part.t(), out=y[0, :, first:last])
    return y


def int_mm_takes(rows: int, weight: Weight, blocks: int) -> bool:
    """Whether `int_mm` computes this: int8 weights and activations with one scale a row each, and rows enough."""
    return weight.format.bits == 8 and weight.format.group == 0 and blocks == 1 and rows >= INT_MM_ROWS


def int_mm(a: torch.Tensor, weight: Weight, config: Mapping[str, int]) -> torch.Tensor:
    """a int8 `[rows, columns]`, columns a multiple of 16 from k on, times the integers q: int32 `[1, rows, 16 · tiles]`."""
    rows, stride = a.shape
    total = weight.tiles * TILE
    y = a.new_empty((1, rows, total), dtype=torch.int32)
    chunks = _chunks(total, stride, config["chunk"])
    scratch = a.new_empty((chunks[0][1], stride))
    for first, last in chunks:
        part = scratch[: last - first]
        dequantize(weight, first, last, stride, part)
        if len(chunks) == 1:
            torch._int_mm(a, part.t(), out=y[0])
        else:  # it writes a whole matrix alone
            y[0, :, first:last] = torch._int_mm(a, part.t())
    return y
