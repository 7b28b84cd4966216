"""One row of x at a time, without tensor cores: the kernel of decoding, bound by the bytes of the weight.

A program takes `BLOCK_N` rows of the weight and a part of K. In a step it holds words `[V, BLOCK_N]`, takes their columns one
after another, and multiplies what it summed by the scale of the group once a word: `acc += S · (Σ a·q − Z · Σ a)`. The sum over
V comes last. Parts of K go to a buffer of partial sums, which `edges.finish` adds in order.

Int8 activations are taken as numbers: the sum of a word's products is below 2^24, so exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device
from qcompiler.gpu.activations import finite_or_nan
from qcompiler.gpu.codes import COUNTS, EXPONENT, WORD_COLUMNS, code_at, load_scales, load_some, load_words, load_zeros
from qcompiler.gpu.dispatch import splits
from qcompiler.gpu.weight import Weight


@triton.jit(do_not_specialize=COUNTS)
def _gemv(
    x_ptr, sa_ptr, words_ptr, scales_ptr, zeros_ptr, expert_ptr, partial_ptr,
    rows, n, k, x_stride, sa_blocks, row_words, tiles, groups, experts, steps, steps_each, exponent,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORD_K: tl.constexpr, SYMMETRIC: tl.constexpr, CENTER: tl.constexpr,
    SA_WIDTH: tl.constexpr, EXPERT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < tiles * 16
    lines = outputs.to(tl.int64)
    if EXPERT:
        expert = tl.load(expert_ptr + row)
        lines += expert * (tiles * 16)
        mask = mask & (expert >= 0) & (expert < experts)
    x_ptr += row * x_stride
    ONE_GROUP: tl.constexpr = GROUP == 0 or GROUP % (V * WORD_K) == 0
    MINUS: tl.constexpr = CENTER if SYMMETRIC else 0
    acc = tl.zeros([V, BLOCK_N], tl.float32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, steps)):
        first = step * V
        words = load_words(words_ptr, lines, mask, first, row_words, V, BITS, EVEN_K)
        start = ((first + tl.arange(0, V)) * WORD_K)[:, None]
        part = tl.zeros([V, BLOCK_N], tl.float32)
        sums = tl.zeros([V, 1], tl.float32)
        for column in tl.static_range(WORD_K):
            a = load_some(x_ptr + start + column, start + column < k, EVEN_K).to(tl.float32)
            part += code_at(words, exponent, (column % 4) * 8 + (column // 4) * BITS, BITS, MINUS) * a
            if not SYMMETRIC:
                sums += a
        if GROUP == 0:
            group = tl.zeros([1, 1], tl.int32)
        elif ONE_GROUP:
            group = tl.zeros([1, 1], tl.int32) + first * WORD_K // GROUP
        else:
            group = start // GROUP
        inside = mask[None, :] & (group < groups)
        if not SYMMETRIC:
            part -= load_zeros(zeros_ptr, lines[None, :], groups, group, inside, BITS).to(tl.float32) * sums
        scale = load_scales(scales_ptr, lines[None, :], groups, group, inside)
        if SA_WIDTH > 0:
            block = start // SA_WIDTH
            scale = scale * tl.load(sa_ptr + row * sa_blocks + block, mask=block < sa_blocks, other=0.0)
        acc += part * scale
    total = finite_or_nan(tl.sum(acc, 0))
    if SA_WIDTH < 0:
        total = total * tl.load(sa_ptr + row)
    tl.store(partial_ptr + (split * rows + row) * n + outputs, total, mask=outputs < n)


def gemv(
    x: torch.Tensor, sa: torch.Tensor | None, weight: Weight, config: Mapping[str, int], expert: torch.Tensor | None = None
) -> torch.Tensor:
    """Partial sums float32 `[splits, rows, n]`.

    Args:
        x: `[rows, k]` float, or int8 with sa, of any row stride.
        sa: float32 `[rows, blocks]`, scales of int8 activations; one block, or one for each 128 inputs.
        config: of kernel `gemv`.
        expert: int64 `[rows]`, which of the weight's matrices a row meets.
    """
    rows, bits = x.shape[0], weight.format.bits
    word = WORD_COLUMNS[bits]
    words = config["block_k"] // word
    steps = triton.cdiv(weight.row_words, words)
    tiles = triton.cdiv(weight.n, config["block_n"])
    count = splits(config["split"], rows * tiles, steps, device.processors(x.device))
    each = triton.cdiv(steps, count)
    count = triton.cdiv(steps, each)
    partial = x.new_empty((count, rows, weight.n), dtype=torch.float32)
    blocks = 0 if sa is None else sa.shape[1]
    if partial.numel():
        with device.on(x.device):
            _gemv[(rows, tiles, count)](
                x, sa, weight.words, weight.scales, weight.zeros, expert, partial, rows, weight.n, weight.k, x.stride(0),
                blocks, weight.row_words, weight.tiles, weight.groups, weight.experts, steps, each, EXPONENT,
                BITS=bits, GROUP=weight.format.group, WORD_K=word, SYMMETRIC=weight.zeros is None, CENTER=weight.center,
                SA_WIDTH=0 if sa is None else -1 if blocks == 1 else 128, EXPERT=expert is not None,
                EVEN_K=weight.k % (words * word) == 0,
                BLOCK_N=config["block_n"], V=words, num_warps=config["warps"], num_stages=config["stages"],
            )  # fmt: skip
    return partial
