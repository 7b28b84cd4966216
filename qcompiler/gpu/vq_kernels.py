"""Triton kernels of products with vector-quantized weights: one row, a few rows, the dequantized weight, rows of an embedding.

A product is written as partial sums float32 `[splits, rows, n]`, a stretch of the columns each; what adds them up does so in
their order, so results do not depend on which program ends first. Activations that are not finite become NaN as they are read,
and every output of a row has read all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.gpu.activations import finite_or_nan
from qcompiler.gpu.vq_codes import books, factors, index_words, number_of, row_words, whole_entries


@triton.jit
def gemv(
    x, sa, codes, codebooks, book_scales, scales, partials, rows, n, k, spans_of_split, units, groups, across, blocks,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, SPANS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products without tensor cores: every entry is looked up once and multiplied with that column of `ROWS` rows.

    Programs: tiles of n, splits of k, tiles of rows. `spans_of_split` is a multiple of SPANS.

    Args:
        x: `[rows, k]`: activations, or integers where `INTEGER`; then `sa` float32 `[rows, blocks]` are their scales.
        GATHER: look up by `tl.gather`; a step of SPANS spans and BLOCK_N rows then has one codebook.
    """
    SPAN: tl.constexpr = 4 * DIM
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside, given = at < n, row < rows
    begin = row_words(at, units, INDEX_BITS)[None, :]
    begin_x = (row.to(tl.int64) * k)[:, None]
    first = tl.program_id(1) * spans_of_split
    last = tl.minimum(first + spans_of_split, tl.cdiv(k, SPAN))
    total = tl.zeros([ROWS, SPANS, BLOCK_N], tl.float32)
    for start in range(first, last, SPANS):
        span = start + tl.arange(0, SPANS)
        column = span * SPAN
        mask = (column < k)[:, None] & inside[None, :]
        index = index_words(codes, begin, span[:, None], mask, INDEX_BITS)
        book = books(at[None, :], column[:, None], across, BLOCK_ROWS, BLOCK_COLUMNS)
        part = tl.zeros([ROWS, SPANS, BLOCK_N], tl.float32)
        if GATHER:
            one = books(tl.program_id(0) * BLOCK_N, start * SPAN, across, BLOCK_ROWS, BLOCK_COLUMNS)
            table = whole_entries(codebooks, one, DIM, CENTROIDS)
        for i in tl.static_range(4):
            number = (index >> (8 * i)) & 255
            if GATHER:
                entries = tl.reshape(tl.gather(table, tl.reshape(number, [SPANS * BLOCK_N]), 0), [SPANS, BLOCK_N])
            for j in tl.static_range(DIM):
                if GATHER:
                    level = number_of(entries, j)
                else:
                    level = tl.load(codebooks + (book * (DIM * CENTROIDS) + (j * CENTROIDS + number)), mask=mask, other=0)
                place = column + (4 * j + i)
                present = given[:, None] & (place < k)[None, :]
                value = tl.load(x + (begin_x + place[None, :]), mask=present, other=0).to(tl.float32)
                if not INTEGER:
                    value = finite_or_nan(value)
                part += level.to(tl.float32)[None, :, :] * value[:, :, None]
        factor = factors(scales, book_scales, at[None, :], column[:, None], book, groups, mask, GROUP)[None, :, :]
        if INTEGER:
            present = given[:, None] & (column < k)[None, :]
            own = tl.load(sa + (row[:, None] * blocks + (column // 128)[None, :]), mask=present, other=0.0)
            factor = factor * own[:, :, None]
        total += part * factor
    out = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * n + at[None, :]
    tl.store(partials + out, tl.sum(total, axis=1), mask=given[:, None] & inside[None, :])


@triton.jit
def levels(
    codes, codebooks, begin, segment, book, inside, k,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, GATHER: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The entries of SEGMENT columns in natural order, int8 `[SEGMENT, BLOCK_N]`; 0 for rows beyond n.

    Args:
        begin, inside: of the rows: `row_words`, and which to read.
        book: of each row, int64 `[BLOCK_N]`; all the same where GATHER.
    """
    SPAN: tl.constexpr = 4 * DIM
    SPANS: tl.constexpr = SEGMENT // SPAN
    span = segment * SPANS + tl.arange(0, SPANS)
    mask = (span * SPAN < k)[:, None] & inside[None, :]
    index = index_words(codes, begin[None, :], span[:, None], mask, INDEX_BITS)
    shift = (tl.arange(0, 4) * 8)[None, None, :, None]
    number = (index[:, None, None, :] >> shift) & 255  # [SPANS, 1, 4, BLOCK_N]
    j = tl.arange(0, DIM)[None, :, None, None]
    if GATHER:
        table = whole_entries(codebooks, tl.min(book, axis=0), DIM, CENTROIDS)
        entries = tl.gather(table, tl.reshape(number, [SPANS * 4 * BLOCK_N]), 0)
        level = ((tl.reshape(entries, [SPANS, 1, 4, BLOCK_N]) << (24 - 8 * j)) >> 24).to(tl.int8)
    else:
        start = (book * (DIM * CENTROIDS))[None, None, None, :]
        level = tl.load(codebooks + (start + (j * CENTROIDS + number)), mask=inside[None, None, None, :], other=0)
    return tl.reshape(level, [SEGMENT, BLOCK_N])


@triton.jit
def dot(
    x, sa, codes, codebooks, book_scales, scales, partials, rows, n, k, segments_of_split, units, groups, across, blocks,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products with tensor cores: the entries of a segment as they are, its partial sum times `S · c` (and `sa`).

    Programs: tiles of n, splits of k, tiles of rows. The arguments are those of `gemv`; a segment is a group, or 128 columns.
    """
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside, given = at < n, row < rows
    begin = row_words(at, units, INDEX_BITS)
    begin_x = (row.to(tl.int64) * k)[:, None]
    first = tl.program_id(1) * segments_of_split
    last = tl.minimum(first + segments_of_split, tl.cdiv(k, SEGMENT))
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for segment in range(first, last):
        column = segment * SEGMENT
        book = books(tl.where(inside, at, n - 1), column, across, BLOCK_ROWS, BLOCK_COLUMNS)
        weight = levels(
            codes, codebooks, begin, segment, book, inside, k, DIM, CENTROIDS, INDEX_BITS, GATHER, SEGMENT, BLOCK_N
        )
        place = column + tl.arange(0, SEGMENT)
        present = given[:, None] & (place < k)[None, :]
        value = tl.load(x + (begin_x + place[None, :]), mask=present, other=0)
        factor = factors(scales, book_scales, at, column, book, groups, inside, GROUP)[None, :]
        if INTEGER:
            part = tl.dot(value, weight, out_dtype=tl.int32).to(tl.float32)
            factor = factor * tl.load(sa + (row * blocks + column // 128), mask=given, other=0.0)[:, None]
        else:
            part = tl.dot(finite_or_nan(value), weight.to(value.dtype), input_precision="ieee")
        total += part * factor
    out = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * n + at[None, :]
    tl.store(partials + out, total, mask=given[:, None] & inside[None, :])


@triton.jit
def dequantize(
    codes, codebooks, book_scales, scales, weight, first, count, k, units, groups, across,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows `first …` of W = (S · c) · entry, rounded to float32 and then to the type of `weight` `[count, k]`.

    Programs: tiles of rows, segments.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    at = first + tl.where(inside, row, 0)
    segment = tl.program_id(1)
    column = segment * SEGMENT
    book = books(at, column, across, BLOCK_ROWS, BLOCK_COLUMNS)
    begin = row_words(at, units, INDEX_BITS)
    level = levels(codes, codebooks, begin, segment, book, inside, k, DIM, CENTROIDS, INDEX_BITS, False, SEGMENT, BLOCK_N)
    value = level.to(tl.float32) * factors(scales, book_scales, at, column, book, groups, inside, GROUP)[None, :]
    place = column + tl.arange(0, SEGMENT)
    out = row.to(tl.int64)[None, :] * k + place[:, None]
    tl.store(weight + out, value.to(weight.dtype.element_ty), mask=inside[None, :] & (place < k)[:, None])


@triton.jit
def embed(
    indices, codes, codebooks, book_scales, scales, y, n, k, units, groups, across,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Row `indices[p]` of W, float32 `[positions, k]`. Programs: positions, SEGMENTS segments each.

    Negative indices count from the end; one outside [-n, n) reads nothing and gives NaN.
    """
    given = tl.load(indices + tl.program_id(0)) + tl.arange(0, 1)
    counted = tl.where(given < 0, given + n, given)
    inside = (counted >= 0) & (counted < n)
    at = tl.where(inside, counted, 0)
    begin = row_words(at, units, INDEX_BITS)
    for step in range(SEGMENTS):
        segment = tl.program_id(1) * SEGMENTS + step
        column = segment * SEGMENT
        known = inside & (column < k)
        book = books(at, tl.minimum(column, k - 1), across, BLOCK_ROWS, BLOCK_COLUMNS)
        level = levels(codes, codebooks, begin, segment, book, known, k, DIM, CENTROIDS, INDEX_BITS, False, SEGMENT, 1)
        factor = factors(scales, book_scales, at, column, book, groups, known, GROUP)
        value = tl.where(inside[None, :], level.to(tl.float32) * factor[None, :], float("nan"))
        place = column + tl.arange(0, SEGMENT)[:, None]
        tl.store(y + (tl.program_id(0).to(tl.int64) * k + place), value, mask=place < k)
