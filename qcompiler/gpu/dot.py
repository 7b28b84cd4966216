"""Several rows of x at once, with tensor cores: `tl.dot` of a block of x with a block of the weight that was decoded for it.

A step of `BLOCK_K` columns lies in one group of the weight and one block of the activations, so that scales meet the product of
the step, not each weight. Int8 activations meet integers `q − Z`, summed in int32: exact. Rows may be sorted by expert first
(`order`, `owner`); blocks of fewer rows than `BLOCK_M` are filled up with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device
from qcompiler.gpu.activations import finite_or_nan
from qcompiler.gpu.codes import COUNTS, EXPONENT, HALF_EXPONENT, WORD_COLUMNS, expand, load_scales, load_words, load_zeros
from qcompiler.gpu.dispatch import splits
from qcompiler.gpu.weight import Weight
from qcompiler.ops.formats import ACTIVATION_BLOCK


@triton.jit(do_not_specialize=COUNTS)
def _dot(
    x_ptr, sa_ptr, words_ptr, scales_ptr, zeros_ptr, order_ptr, owner_ptr, partial_ptr,
    rows, n, k, x_stride, sa_blocks, row_words, tiles, groups, experts, steps, steps_each, exponent,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORD_K: tl.constexpr, SYMMETRIC: tl.constexpr, CENTER: tl.constexpr,
    INTEGER: tl.constexpr, SA_WIDTH: tl.constexpr, EXPERT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < tiles * 16
    lines = outputs.to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if EXPERT:
        row = tl.load(order_ptr + row)  # rows where there is none
        expert = tl.load(owner_ptr + block)
        lines += expert * (tiles * 16)
        mask = mask & (expert >= 0) & (expert < experts)
    there = row < rows
    V: tl.constexpr = BLOCK_K // WORD_K
    columns = tl.arange(0, BLOCK_K)
    WIDE: tl.constexpr = INTEGER and BITS == 8 and not SYMMETRIC  # q − Z does not fit int8: by the sums of a
    LATE: tl.constexpr = GROUP == 0 and SA_WIDTH <= 0  # one segment: the scales meet the sum
    dtype: tl.constexpr = tl.int8 if INTEGER else x_ptr.dtype.element_ty
    sums = tl.zeros([BLOCK_M], tl.int32)
    if INTEGER and LATE:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, steps)):
        at = step * BLOCK_K
        place = row[:, None] * x_stride + (at + columns)[None, :]
        seen = there[:, None]
        if not EVEN_K:
            seen = seen & (at + columns < k)[None, :]
        a = tl.load(x_ptr + place, mask=seen, other=0)
        words = load_words(words_ptr, lines, mask, at // WORD_K, row_words, V, BITS, EVEN_K)
        group = 0
        if GROUP > 0:
            group = at // GROUP
        if SYMMETRIC:
            minus = tl.full([1, BLOCK_N], CENTER, tl.int32)
        else:
            minus = load_zeros(zeros_ptr, lines, groups, group, mask, BITS)[None, :]
        if WIDE:
            minus = minus - CENTER  # of signed codes
            taken = tl.full([1, BLOCK_N], CENTER, tl.int32)
            sums += tl.sum(a.to(tl.int32), 1)
        else:
            taken = minus
        w = tl.trans(expand(words, taken, exponent, V, BLOCK_N, BITS, WORD_K, dtype))
        if LATE:
            if INTEGER:
                acc = tl.dot(a, w, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(a, w, acc, input_precision="ieee")
        else:
            scale = load_scales(scales_ptr, lines, groups, group, mask)[None, :]
            if INTEGER:
                product = tl.dot(a, w, out_dtype=tl.int32)
                if WIDE:
                    product -= minus * sums[:, None]
                    sums = tl.zeros([BLOCK_M], tl.int32)
                if SA_WIDTH > 0:
                    scale = scale * tl.load(sa_ptr + row * sa_blocks + at // SA_WIDTH, mask=there, other=0.0)[:, None]
                acc += product.to(tl.float32) * scale
            else:
                acc += tl.dot(a, w, input_precision="ieee") * scale
    if LATE:
        if WIDE:
            acc -= (load_zeros(zeros_ptr, lines, groups, 0, mask, BITS) - CENTER)[None, :] * sums[:, None]
        total = acc.to(tl.float32) * load_scales(scales_ptr, lines, groups, 0, mask)[None, :]
    else:
        total = acc
    if SA_WIDTH < 0:
        total = total * tl.load(sa_ptr + row, mask=there, other=0.0)[:, None]
    target = partial_ptr + (split.to(tl.int64) * rows + row)[:, None] * n + outputs[None, :]
    tl.store(target, finite_or_nan(total), mask=there[:, None] & (outputs < n)[None, :])


def blocks_of_rows(expert: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by expert and cut into blocks of one expert each, without waiting for the device.

    Args:
        expert: int64 `[rows]`, in `[0, experts)`.
        block: rows of a block.

    Returns:
        order int64 `[blocks · block]`, rows ascending within an expert, `rows` where a block has no more; owner int64 `[blocks]`,
        `experts` for blocks that nobody needs.
    """
    rows, place = expert.numel(), expert.device
    ranked, order = torch.sort(expert, stable=True)
    edge = torch.searchsorted(ranked, torch.arange(experts + 1, device=place))
    counts = edge[1:] - edge[:-1]
    ends = torch.cumsum((counts + block - 1) // block, 0)
    number = rows // block + min(rows, experts)  # at most so many blocks
    owner = torch.searchsorted(ends, torch.arange(number, device=place), right=True)
    known = owner.clamp(max=experts - 1)
    before = torch.cat([ends.new_zeros(1), ends])[known]
    slot = torch.arange(number * block, device=place).view(number, block)
    within = slot - (before * block)[:, None]
    there = (owner < experts)[:, None] & (within < counts[known][:, None])
    index = (edge[known][:, None] + within).clamp(0, max(rows - 1, 0))
    return torch.where(there, order[index], rows).reshape(-1), owner


def dot(
    x: torch.Tensor, sa: torch.Tensor | None, weight: Weight, config: Mapping[str, int],
    sorted_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Partial sums float32 `[splits, rows, n]`; arguments as of `gemv`.

    Args:
        sorted_rows: `order` int64 `[blocks · block_m]`, a row of x or `rows` for none, and `owner` int64 `[blocks]`, the matrix
            that the rows of a block meet.
    """
    rows, bits, group = x.shape[0], weight.format.bits, weight.format.group
    blocks = 0 if sa is None else sa.shape[1]
    segments = [size for size in (group, ACTIVATION_BLOCK if blocks > 1 else 0) if size]
    block_k = min(config["block_k"], *segments) if segments else config["block_k"]
    steps = triton.cdiv(weight.k, block_k)
    block_m = config["block_m"]
    across = triton.cdiv(rows, block_m) if sorted_rows is None else len(sorted_rows[1])
    tiles = triton.cdiv(weight.n, config["block_n"])
    count = splits(config["split"], across * tiles, steps, device.processors(x.device))
    each = triton.cdiv(steps, count)
    count = triton.cdiv(steps, each)
    partial = x.new_empty((count, rows, weight.n), dtype=torch.float32)
    order, owner = sorted_rows or (None, None)
    if partial.numel():
        with device.on(x.device):
            _dot[(across, tiles, count)](
                x, sa, weight.words, weight.scales, weight.zeros, order, owner, partial, rows, weight.n, weight.k, x.stride(0),
                blocks, weight.row_words, weight.tiles, weight.groups, weight.experts, steps, each,
                HALF_EXPONENT if x.dtype == torch.float16 else EXPONENT,
                BITS=bits, GROUP=group, WORD_K=WORD_COLUMNS[bits], SYMMETRIC=weight.zeros is None, CENTER=weight.center,
                INTEGER=sa is not None, SA_WIDTH=0 if sa is None else -1 if blocks == 1 else ACTIVATION_BLOCK,
                EXPERT=sorted_rows is not None, EVEN_K=weight.k % block_k == 0, BLOCK_M=block_m,
                BLOCK_N=config["block_n"], BLOCK_K=block_k,
                num_warps=config["warps"], num_stages=config["stages"],
            )  # fmt: skip
    return partial
