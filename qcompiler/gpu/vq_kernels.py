"""Triton kernels of products with vector-quantized weights: one row, a few rows, the dequantized weight, rows of an embedding.

A product is written as partial sums float32 `[splits, rows, n]`, a stretch of the columns each; what adds them up does so in
their order, so results do not depend on which program ends first. Every output of a row meets all of it, so an activation that
is not finite makes all of them infinite or NaN; what is not finite is then made NaN.

`codes` are int32 words, `table` the words of entries (`vq_codes`): of int8, or of the 16-bit type of x or of the scratch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.gpu.activations import finite_or_nan
from qcompiler.gpu.vq_codes import books, factors, index_words, look_up, number_of, row_words

# As of `codes.COUNTS`.
COUNTS = ("rows", "units", "groups", "across", "blocks")


@triton.jit(do_not_specialize=(*COUNTS, "spans_of_split"))
def gemv(
    x, sa, codes, table, book_scales, scales, partials, rows, n, k, spans_of_split, units, groups, across, blocks,
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
    safe = tl.where(inside, at, n - 1)
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
        book = books(safe[None, :], tl.minimum(column, k - 1)[:, None], across, BLOCK_ROWS, BLOCK_COLUMNS)
        part = tl.zeros([ROWS, SPANS, BLOCK_N], tl.float32)
        for i in tl.static_range(4):
            number = (index >> (8 * i)) & 255
            if GATHER:
                one = books(tl.program_id(0) * BLOCK_N, start * SPAN, across, BLOCK_ROWS, BLOCK_COLUMNS)
                words = look_up(table, one, number, CENTROIDS, True, SPANS * BLOCK_N)
            else:
                words = look_up(table, book, number, CENTROIDS, False, SPANS * BLOCK_N)
            for j in tl.static_range(DIM):
                level = number_of(words, j, DIM, x).to(tl.float32)
                place = column + (4 * j + i)
                present = given[:, None] & (place < k)[None, :]
                value = tl.load(x + (begin_x + place[None, :]), mask=present, other=0).to(tl.float32)
                part += level[None, :, :] * value[:, :, None]
        factor = factors(scales, book_scales, at[None, :], column[:, None], book, groups, mask, GROUP)[None, :, :]
        if INTEGER:
            present = given[:, None] & (column < k)[None, :]
            own = tl.load(sa + (row[:, None] * blocks + (column // 128)[None, :]), mask=present, other=0.0)
            factor = factor * own[:, :, None]
        total += part * factor
    y = finite_or_nan(tl.sum(total, axis=1))
    out = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * n + at[None, :]
    tl.store(partials + out, y, mask=given[:, None] & inside[None, :])


@triton.jit
def levels(
    codes, table, begin, segment, book, inside, k, like,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, GATHER: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """The entries of SEGMENT columns, `[SEGMENT, BLOCK_N]`; rows that are not inside have some entry.

    Columns are in order where NATURAL, else in that of `vectors_first`: the numbers of a vector, which a word has side by side,
    stay side by side, and so in one register.

    Args:
        begin, inside: of the rows: `row_words`, and which to read.
        book: of each row, int64 `[BLOCK_N]`; all the same where GATHER.
        like: see `number_of`: x, or the scratch.
    """
    SPAN: tl.constexpr = 4 * DIM
    SPANS: tl.constexpr = SEGMENT // SPAN
    span = segment * SPANS + tl.arange(0, SPANS)
    mask = (span * SPAN < k)[:, None] & inside[None, :]
    index = index_words(codes, begin[None, :], span[:, None], mask, INDEX_BITS)
    number = (index[:, None, :] >> (tl.arange(0, 4) * 8)[None, :, None]) & 255  # [SPANS, 4, BLOCK_N]
    if GATHER:
        words = look_up(table, tl.min(book, axis=0), number, CENTROIDS, True, SPANS * 4 * BLOCK_N)
    else:
        words = look_up(table, book[None, None, :], number, CENTROIDS, False, SPANS * 4 * BLOCK_N)
    if DIM == 1:
        level = tl.reshape(number_of(words, 0, DIM, like), [SPANS, 4, BLOCK_N, 1])
    elif DIM == 2:
        level = tl.join(number_of(words, 0, DIM, like), number_of(words, 1, DIM, like))
    else:
        even = tl.join(number_of(words, 0, DIM, like), number_of(words, 2, DIM, like))
        odd = tl.join(number_of(words, 1, DIM, like), number_of(words, 3, DIM, like))
        level = tl.reshape(tl.join(even, odd), [SPANS, 4, BLOCK_N, 4])
    if NATURAL:
        level = tl.permute(level, (0, 3, 1, 2))
    else:
        level = tl.permute(level, (0, 1, 3, 2))
    return tl.reshape(level, [SEGMENT, BLOCK_N])


@triton.jit
def vectors_first(x, DIM: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr):
    """Activations `[ROWS, SEGMENT]` with the columns of a vector side by side: 4j + i of a span becomes DIM · i + j."""
    SPANS: tl.constexpr = SEGMENT // (4 * DIM)
    return tl.reshape(tl.permute(tl.reshape(x, [ROWS, SPANS, DIM, 4]), (0, 1, 3, 2)), [ROWS, SEGMENT])


@triton.jit(do_not_specialize=(*COUNTS, "segments_of_split"))
def dot(
    x, sa, codes, table, book_scales, scales, partials, rows, n, k, segments_of_split, units, groups, across, blocks,
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
    safe = tl.where(inside, at, n - 1)
    begin = row_words(at, units, INDEX_BITS)
    begin_x = (row.to(tl.int64) * k)[:, None]
    first = tl.program_id(1) * segments_of_split
    last = tl.minimum(first + segments_of_split, tl.cdiv(k, SEGMENT))
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for segment in range(first, last):
        column = segment * SEGMENT
        book = books(safe, column, across, BLOCK_ROWS, BLOCK_COLUMNS)
        weight = levels(
            codes, table, begin, segment, book, inside, k, x, DIM, CENTROIDS, INDEX_BITS, GATHER, SEGMENT, BLOCK_N, False
        )
        place = column + tl.arange(0, SEGMENT)
        present = given[:, None] & (place < k)[None, :]
        value = tl.load(x + (begin_x + place[None, :]), mask=present, other=0)
        value = vectors_first(value, DIM, ROWS, SEGMENT)
        factor = factors(scales, book_scales, at, column, book, groups, inside, GROUP)[None, :]
        if INTEGER:
            part = tl.dot(value, weight, out_dtype=tl.int32).to(tl.float32)
            factor = factor * tl.load(sa + (row * blocks + column // 128), mask=given, other=0.0)[:, None]
        else:
            part = tl.dot(value, weight.to(value.dtype), input_precision="ieee")
        total += part * factor
    out = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * n + at[None, :]
    tl.store(partials + out, finite_or_nan(total), mask=given[:, None] & inside[None, :])


@triton.jit(do_not_specialize=("count", "units", "groups", "across"))
def dequantize(
    codes, table, book_scales, scales, weight, first, count, k, units, groups, across,
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
    level = levels(
        codes, table, begin, segment, book, inside, k, weight, DIM, CENTROIDS, INDEX_BITS, False, SEGMENT, BLOCK_N, True
    )
    value = level.to(tl.float32) * factors(scales, book_scales, at, column, book, groups, inside, GROUP)[None, :]
    place = column + tl.arange(0, SEGMENT)
    out = row.to(tl.int64)[None, :] * k + place[:, None]
    tl.store(weight + out, value.to(weight.dtype.element_ty), mask=inside[None, :] & (place < k)[:, None])


@triton.jit(do_not_specialize=("n", "units", "groups", "across"))
def embed(
    indices, codes, table, book_scales, scales, y, n, k, units, groups, across,
    DIM: tl.constexpr, CENTROIDS: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Row `indices[p]` of W, float32 `[positions, k]`. Programs: positions, SEGMENTS segments each.

    Negative indices count from the end; one outside [-n, n), of which the host is told, reads nothing and gives NaN.
    """
    given = tl.load(indices + tl.program_id(0)) + tl.arange(0, 1)
    counted = tl.where(given < 0, given + n, given)
    inside = (counted >= 0) & (counted < n)
    at = tl.where(inside, counted, 0)
    begin = row_words(at, units, INDEX_BITS)
    first = tl.program_id(1) * SEGMENTS
    for segment in range(first, tl.minimum(first + SEGMENTS, tl.cdiv(k, SEGMENT))):
        column = segment * SEGMENT
        book = books(at, column, across, BLOCK_ROWS, BLOCK_COLUMNS)
        level = levels(
            codes, table, begin, segment, book, inside, k, table, DIM, CENTROIDS, INDEX_BITS, False, SEGMENT, 1, True
        )
        factor = factors(scales, book_scales, at, column, book, groups, inside, GROUP)
        value = tl.where(inside[None, :], level.to(tl.float32) * factor[None, :], float("nan"))
        place = column + tl.arange(0, SEGMENT)[:, None]
        tl.store(y + (tl.program_id(0).to(tl.int64) * k + place), value, mask=place < k)
