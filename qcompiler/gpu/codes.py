"""Decoding of packed affine weights (docs/layout.md, W16x4) from the bytes of the artifact, as device functions.

A 64-byte vector is read as 16 int32 words: word r holds four positions of row r of a tile. A **word** here is such an int32 with
`WORD_K` columns of one row; its column 4f + i is the field f of byte i, `bits · f + 8 · i` from the bottom:

| bits | words of a unit | columns of a word | fields of a byte |
|---|---|---|---|
| 8 | 1 | 4 | 1 |
| 4 | 1 | 8 | 2 |
| 3 | 4, the fourth put together from the top bits of three | 8 | 2 |
| 2 | 1 | 16 | 4 |

So words 0, 1, 2 … of a row hold its columns in order, whatever the width. Codes come out unsigned, 0 … 2^bits − 1: those of 8
bits have 128 added, and so have their zero points; `center` is the zero point of the symmetric form.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = 150 << 23  # of 2^23 in float32
HALF_EXPONENT = 25 << 10  # of 2^10 in float16
# Arguments of which nothing but their value is of use: a kernel is not compiled anew for a 1 or a multiple of 16 among them.
COUNTS = ("rows", "sa_blocks", "row_words", "tiles", "groups", "experts", "steps", "steps_each")
WORD_COLUMNS = {8: 4, 4: 8, 3: 8, 2: 16}


@triton.jit
def load_some(ptr, mask, ALL: tl.constexpr):
    """A load of numbers that are read more than once, 0 where masked; a mask that is known to be true costs nothing."""
    if ALL:
        return tl.load(ptr, eviction_policy="evict_last")
    else:
        return tl.load(ptr, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def load_words(words_ptr, rows, mask, first, words, V: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Words `first` … `first + V - 1` of some rows of the weight, int32 `[V, R]`; 0 beyond `words`, the words of a row.

    `rows` int64 `[R]` are rows of all the tiles, `mask` says which exist; EVEN: `words` are a
    multiple of V. With 3 bits `first` and V are multiples of 4.
    """
    tile = rows // 16
    if BITS == 3:
        J: tl.constexpr = V // 4
        unit = first // 4 + tl.arange(0, J)
        inside = mask[None, :]
        if not EVEN:
            inside = inside & (unit < words // 4)[:, None]
        ptr = words_ptr + (tile * (words * 12) + rows % 16)[None, :] + (unit * 48)[:, None]
        b0 = tl.load(ptr, mask=inside, other=0, eviction_policy="evict_first")
        b1 = tl.load(ptr + 16, mask=inside, other=0, eviction_policy="evict_first")
        b2 = tl.load(ptr + 32, mask=inside, other=0, eviction_policy="evict_first")
        b3 = ((b0 >> 2) & 0x30303030) | ((b1 >> 4) & 0x0C0C0C0C) | ((b2 >> 6) & 0x03030303)
        four = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # [J, R, 2, 2]: b0 b1 b2 b3
        return tl.reshape(tl.permute(four, (0, 2, 3, 1)), [V, rows.shape[0]])
    else:
        word = first + tl.arange(0, V)
        inside = mask[None, :]
        if not EVEN:
            inside = inside & (word < words)[:, None]
        ptr = words_ptr + (tile * (words * 16) + rows % 16)[None, :] + (word * 16)[:, None]
        loaded = tl.load(ptr, mask=inside, other=0, eviction_policy="evict_first")
        if BITS == 8:
            loaded ^= -2139062144  # 0x80808080: signed to unsigned
        return loaded


@triton.jit
def expand(
    words, minus, exponent, V: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, WORD_K: tl.constexpr, dtype: tl.constexpr
):
    """`codes − minus` of words `[V, R]`, exact in the dtype: `[R, V · WORD_K]`, columns in order, those of a word in one thread.

    Args:
        minus: int32 in 0 … 255, of a shape that broadcasts to `[V, R]`.
        exponent: as in `code_at`; HALF_EXPONENT where dtype is float16.
        dtype: float32, float16, bfloat16 or int8.
    """
    if WORD_K == 4:
        values = _four(words, minus, exponent, 0, BITS, dtype)
    elif WORD_K == 8:
        low, high = _four(words, minus, exponent, 0, BITS, dtype), _four(words, minus, exponent, BITS, BITS, dtype)
        values = tl.permute(tl.join(low, high), (0, 1, 4, 2, 3))
    else:
        low = tl.join(_four(words, minus, exponent, 0, BITS, dtype), _four(words, minus, exponent, BITS, BITS, dtype))
        high = tl.join(_four(words, minus, exponent, 2 * BITS, BITS, dtype), _four(words, minus, exponent, 3 * BITS, BITS, dtype))
        values = tl.permute(tl.join(low, high), (0, 1, 5, 4, 2, 3))
    return tl.reshape(tl.permute(tl.reshape(values, [V, R, WORD_K]), (1, 0, 2)), [R, V * WORD_K])


@triton.jit
def _four(words, minus, exponent, BIT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """A field of the four bytes of each word, `[…, 2, 2]`."""
    if dtype == tl.float16:
        return tl.join(_halves(words, minus, exponent, BIT, BITS), _halves(words >> 8, minus, exponent, BIT, BITS))
    else:
        even = tl.join(_field(words, minus, exponent, BIT, BITS, dtype), _field(words, minus, exponent, BIT + 16, BITS, dtype))
        odd = tl.join(_field(words, minus, exponent, BIT + 8, BITS, dtype), _field(words, minus, exponent, BIT + 24, BITS, dtype))
        return tl.join(even, odd)


@triton.jit
def _halves(words, minus, exponent, BIT: tl.constexpr, BITS: tl.constexpr):
    """A field of bytes 0 and 2, `[…, 2]` float16: both become numbers at once."""
    mask: tl.constexpr = (((1 << BITS) - 1) << BIT) * 0x10001
    pair = (words & mask) | (exponent - (BIT << 10)) * 0x10001
    both = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)).to(tl.float16, bitcast=True)
    return both - (minus + (1 << (10 - BIT))).to(tl.float16)[:, :, None]


@triton.jit
def _field(words, minus, exponent, BIT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    low: tl.constexpr = BIT % 8
    mask: tl.constexpr = ((1 << BITS) - 1) << low
    if dtype == tl.int8:
        return (((words >> BIT) & ((1 << BITS) - 1)) - minus).to(tl.int8)
    code = (words >> (BIT - low)) & mask  # a shift serves all fields of a byte
    value = (code | (exponent - (low << 23))).to(tl.float32, bitcast=True)
    return (value - (minus + (1 << (23 - low))).to(tl.float32)).to(dtype)


@triton.jit
def code_at(words, exponent, BIT: tl.constexpr, BITS: tl.constexpr, MINUS: tl.constexpr):
    """The code at a bit of each word, minus a constant, as float32.

    The code becomes part of a mantissa, so that no conversion is needed, which takes longer than a sum. `exponent` is EXPONENT
    as an argument of the kernel: an instruction holds one constant, and two would make two of `words & mask | exponent`.
    """
    at: tl.constexpr = BIT % 16
    if BIT >= 16:
        words = words >> 16
    mask: tl.constexpr = ((1 << BITS) - 1) << at
    # Of 2^(23 - at), where bit `at` of the mantissa is worth 1.
    bits = (words & mask) | (exponent - (at << 23))
    one: tl.constexpr = float(1 << (23 - at)) + MINUS
    return bits.to(tl.float32, bitcast=True) - one


@triton.jit
def load_zeros(zeros_ptr, rows, groups, group, mask, BITS: tl.constexpr):
    """Zero points of a group of each row, int32, of the shape to which rows, group and mask broadcast."""
    bit = (rows % 16) * BITS
    ptr = zeros_ptr + ((rows // 16) * groups + group) * (2 * BITS) + bit // 8
    z = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    if BITS == 3:  # a field may lie across two bytes
        z |= tl.load(ptr + 1, mask=mask & (bit // 8 < 5), other=0).to(tl.int32) << 8
    if BITS == 8:
        return z ^ 128
    return (z >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def load_scales(scales_ptr, rows, groups, group, mask):
    """Scales of a group of each row, float32."""
    ptr = scales_ptr + ((rows // 16) * groups + group) * 16 + rows % 16
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
