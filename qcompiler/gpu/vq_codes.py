"""Indices and entries of vector-quantized weights, read from the packed bytes by Triton kernels (docs/layout.md).

Every kind of index is first brought to one form: an int32 word holds the four indices of a span and a row, one a byte, vector i
in byte i. A 64-byte vector read as int32 is sixteen such words, a row each, so the words of one tile lie side by side in memory
and few instructions serve 4 · dim weights.

Entries are looked up in tables of words, derived from the codebooks once: a word holds the `dim` numbers of an entry, as int8 or
in the type of the activations, so one load serves `dim` weights. They are taken from memory, 4 · centroids bytes at most that the
first cache keeps, or by `tl.gather` from a tile of words, where one codebook serves a whole tile of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def index_words(codes, row, span, mask, INDEX_BITS: tl.constexpr):
    """The indices of spans: int32, one index a byte, in the shape that `row` and `span` broadcast to.

    Args:
        codes: int32 pointer to the packed indices.
        row: int64, where the row's words begin: `tile · units · words of a unit + row of the tile`.
        span: number of the span, int32.
        mask: where to read; elsewhere the indices are 0.
        INDEX_BITS: 2, 3, 4, 5, 6 or 8.
    """
    if INDEX_BITS == 8:
        words = tl.load(codes + (row + span * 16), mask=mask, other=0)
    elif INDEX_BITS == 4:
        packed = tl.load(codes + (row + (span // 2) * 16), mask=mask, other=0)
        words = (packed >> ((span % 2) * 4)) & 0x0F0F0F0F
    elif INDEX_BITS == 2:
        packed = tl.load(codes + (row + (span // 4) * 16), mask=mask, other=0)
        words = (packed >> ((span % 4) * 2)) & 0x03030303
    elif INDEX_BITS == 6:
        words = _six_bits(codes, row + (span // 4) * 48, span % 4, mask)
    elif INDEX_BITS == 3:
        pair = _six_bits(codes, row + (span // 8) * 48, (span // 2) % 4, mask)
        words = (pair >> ((span % 2) * 3)) & 0x07070707
    else:
        tl.static_assert(INDEX_BITS == 5)
        words = _five_bits(codes, row + (span // 8) * 80, span % 8, mask)
    return words


@triton.jit
def _six_bits(codes, unit, which, mask):
    """I0 … I3 of a unit of three vectors: the low bits of one, or the upper two bits of all."""
    last = which == 3
    own = tl.load(codes + (unit + tl.minimum(which, 2) * 16), mask=mask, other=0)
    first = tl.load(codes + unit, mask=mask & last, other=0)
    second = tl.load(codes + (unit + 16), mask=mask & last, other=0)
    upper = ((first >> 6) & 0x03030303) << 4 | ((second >> 6) & 0x03030303) << 2 | ((own >> 6) & 0x03030303)
    return tl.where(last, upper, own & 0x3F3F3F3F)


@triton.jit
def _five_bits(codes, unit, which, mask):
    """I0 … I7 of a unit of five vectors: the low bits of one, or the upper three bits of V0 … V2 and some of V3 and V4."""
    upper = which >= 5
    own = tl.load(codes + (unit + tl.where(upper, which - 5, which) * 16), mask=mask, other=0)
    other = tl.load(codes + (unit + tl.where(which == 6, 64, 48)), mask=mask & upper, other=0)
    last = tl.load(codes + (unit + 64), mask=mask & (which == 7), other=0)
    two = ((other >> 5) & 0x03030303) << 3
    ones = ((other >> 7) & 0x01010101) << 3 | ((last >> 7) & 0x01010101) << 4
    high = ((own >> 5) & 0x07070707) | tl.where(which == 7, ones, two)
    return tl.where(upper, high, own & 0x1F1F1F1F)


@triton.jit
def row_words(at, units, INDEX_BITS: tl.constexpr):
    """Where the words of rows `at` of the weight begin, int64; `units`: of a tile."""
    size: tl.constexpr = 80 if INDEX_BITS == 5 else 48 if INDEX_BITS % 3 == 0 else 16
    return (at // 16).to(tl.int64) * units * size + at % 16


@triton.jit
def books(at, column, across, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Number of the codebook of rows and columns, int64, in the shape that they broadcast to."""
    if BLOCK_ROWS == 0:
        down = at * 0
    else:
        down = at // BLOCK_ROWS
    if BLOCK_COLUMNS == 0:
        right = column * 0
    else:
        right = column // BLOCK_COLUMNS
    return down.to(tl.int64) * across + right


@triton.jit
def factors(scales, book_scales, at, column, book, groups, mask, GROUP: tl.constexpr):
    """S · c of rows and columns, float32, exact; 0 where `mask` is not."""
    if GROUP == 0:
        group = column * 0
    else:
        group = column // GROUP
    own = tl.load(scales + ((at // 16).to(tl.int64) * groups + group) * 16 + at % 16, mask=mask, other=0.0)
    shared = tl.load(book_scales + book, mask=mask, other=0.0)
    return own.to(tl.float32) * shared.to(tl.float32)


@triton.jit
def number_of(words, J: tl.constexpr, DIM: tl.constexpr, like):
    """Number J of entries in words of DIM: int8, or where the words are twice as wide, what the pointer `like` is to."""
    if words.dtype.primitive_bitwidth == 16 * DIM:
        number = (words >> (16 * J)).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
    else:
        number = (words >> (8 * J)).to(tl.int8)
    return number


@triton.jit
def look_up(table, book, number, CENTROIDS: tl.constexpr, GATHER: tl.constexpr, SIZE: tl.constexpr):
    """The words of entries, in the shape that `book`, int64, and `number` broadcast to, SIZE of them.

    With GATHER `book` is one number.
    """
    if GATHER:
        words = tl.load(table + (book * CENTROIDS + tl.arange(0, CENTROIDS)))
        found = tl.reshape(tl.gather(words, tl.reshape(number, [SIZE]), 0), number.shape)
    else:
        found = tl.load((table + book * CENTROIDS) + number.to(tl.uint32))
    return found
