"""The packed layout W16x4 (docs/layout.md): pack, unpack and byte counts, in numpy.

One 64-byte vector holds 16 rows x 4 positions; every instruction set reads the same bytes.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ops.formats import TILE, AffineFormat

LARGEST_HALF = 65504.0
UNIT_K = {8: 4, 4: 8, 3: 32, 2: 16}
UNIT_BYTES = {8: 64, 4: 64, 3: 192, 2: 64}


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def codes_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of `codes`, uint8: `[tiles, units, unit_bytes]`."""
    return _ceil(n, TILE), _ceil(k, UNIT_K[bits]), UNIT_BYTES[bits]


def scales_shape(n: int, k: int, format: AffineFormat) -> tuple[int, int, int]:
    """Shape of `scales`, float16: `[tiles, groups, 16]`."""
    return _ceil(n, TILE), format.groups(k), TILE


def zeros_shape(n: int, k: int, format: AffineFormat) -> tuple[int, int, int]:
    """Shape of `zeros`, uint8: `[tiles, groups, 2 * bits]`."""
    return _ceil(n, TILE), format.groups(k), 2 * format.bits


def outliers_shape(n: int, columns: int) -> tuple[int, int, int]:
    """Shape of `outliers`, float16: `[tiles, columns, 16]`."""
    return _ceil(n, TILE), columns, TILE


def packed_bytes(n: int, k: int, format: AffineFormat) -> dict[str, int]:
    """Bytes of a packed matrix `[n, k]` by what they are; the values sum to the size of its tensors.

    Keys: `codes`, `scales`, `zeros` (of the n x k weights alone, fractions of a byte rounded up), `padding` (the rest
    of tiles and units).
    """
    stored = int(np.prod(codes_shape(n, k, format.bits))) + 2 * int(np.prod(scales_shape(n, k, format)))
    zeros = 0
    if not format.symmetric:
        stored += int(np.prod(zeros_shape(n, k, format)))
        zeros = _ceil(n * format.groups(k) * format.bits, 8)
    codes, scales = _ceil(n * k * format.bits, 8), 2 * n * format.groups(k)
    return {"codes": codes, "scales": scales, "zeros": zeros, "padding": stored - codes - scales - zeros}


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[n, k]` (int8 for 8 bits, unsigned below) -> uint8 `[tiles, units, unit_bytes]`.

    Raises:
        ValueError: a code outside the range of `bits`.
    """
    n, k = codes.shape
    low, high = (-128, 127) if bits == 8 else (0, 2**bits - 1)
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes of {bits} bits lie in [{low}, {high}], found [{codes.min()}, {codes.max()}]")
    tiles, units, _ = codes_shape(n, k, bits)
    unit_k = UNIT_K[bits]
    center = 0 if bits == 8 else 2 ** (bits - 1)
    padded = np.full((tiles * TILE, units * unit_k), center, np.int8 if bits == 8 else np.uint8)
    padded[:n, :k] = codes
    # [tiles, units, row, fields of 4 positions, 4]
    unit = padded.view(np.uint8).reshape(tiles, TILE, units, unit_k // 4, 4).transpose(0, 2, 1, 3, 4)
    field = lambda f: unit[:, :, :, f, :].reshape(tiles, units, 64)  # noqa: E731
    if bits == 8:
        return np.ascontiguousarray(field(0))
    if bits == 4:
        return field(0) | field(1) << 4
    if bits == 2:
        return field(0) | field(1) << 2 | field(2) << 4 | field(3) << 6
    index = [field(2 * m) | field(2 * m + 1) << 3 for m in range(4)]  # four vectors of 6-bit pairs ...
    extra = index[3]  # ... of which the fourth rides in the top bits of the others
    parts = [index[0] | (extra >> 4) << 6, index[1] | (extra >> 2 & 3) << 6, index[2] | (extra & 3) << 6]
    return np.concatenate(parts, axis=2)


def unpack_codes(packed: np.ndarray, n: int, k: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 `[tiles, units, unit_bytes]` -> codes `[n, k]`, int8 or uint8."""
    tiles, units, _ = packed.shape
    if packed.shape != codes_shape(n, k, bits):
        raise ValueError(f"packed codes of a {n} x {k} matrix of {bits} bits are {codes_shape(n, k, bits)}, found {packed.shape}")
    if bits == 8:
        fields = [packed]
    elif bits == 4:
        fields = [packed & 15, packed >> 4]
    elif bits == 2:
        fields = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
    else:
        b0, b1, b2 = packed[:, :, :64], packed[:, :, 64:128], packed[:, :, 128:]
        index = [b0 & 63, b1 & 63, b2 & 63, (b0 >> 6) << 4 | (b1 >> 6) << 2 | b2 >> 6]
        fields = [part for i in index for part in (i & 7, i >> 3)]
    unit = np.stack([f.reshape(tiles, units, TILE, 4) for f in fields], axis=3)
    rows = unit.transpose(0, 2, 1, 3, 4).reshape(tiles * TILE, units * UNIT_K[bits])[:n, :k]
    return np.ascontiguousarray(rows.view(np.int8) if bits == 8 else rows)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """Scales `[n, groups]` -> float16 `[tiles, groups, 16]`, rows beyond n zero."""
    n, groups = scales.shape
    tiles = _ceil(n, TILE)
    padded = np.zeros((tiles * TILE, groups), np.float16)
    padded[:n] = scales
    return np.ascontiguousarray(padded.reshape(tiles, TILE, groups).transpose(0, 2, 1))


def unpack_scales(packed: np.ndarray, n: int) -> np.ndarray:
    """float16 `[tiles, groups, 16]` -> float16 `[n, groups]`."""
    tiles, groups, _ = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(tiles * TILE, groups)[:n])


def pack_outliers(weights: np.ndarray) -> np.ndarray:
    """Float columns of a weight `[n, columns]` -> float16 `[tiles, columns, 16]`, rows beyond n zero.

    Raises:
        ValueError: a weight that float16 cannot hold.
    """
    largest = np.abs(weights).max(initial=0)
    if not largest <= LARGEST_HALF:
        raise ValueError(f"outlier columns are stored in float16, which holds at most {LARGEST_HALF:g}; found {largest:g}")
    return pack_scales(weights)


def unpack_outliers(packed: np.ndarray, n: int) -> np.ndarray:
    """float16 `[tiles, columns, 16]` -> float16 `[n, columns]`."""
    return unpack_scales(packed, n)


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Zero points `[n, groups]` (int8 for 8 bits, unsigned below) -> uint8 `[tiles, groups, 2 * bits]`."""
    n, groups = zeros.shape
    tiles = _ceil(n, TILE)
    padded = np.zeros((tiles * TILE, groups), np.int8 if bits == 8 else np.uint8)
    padded[:n] = zeros
    by_group = padded.view(np.uint8).reshape(tiles, TILE, groups).transpose(0, 2, 1)
    bit = by_group[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # [tiles, groups, row, bit], least significant first
    return np.packbits(bit.reshape(tiles, groups, TILE * bits), axis=2, bitorder="little")


def unpack_zeros(packed: np.ndarray, n: int, bits: int) -> np.ndarray:
    """uint8 `[tiles, groups, 2 * bits]` -> zero points `[n, groups]`, int8 for 8 bits, uint8 below."""
    tiles, groups, _ = packed.shape
    bit = np.unpackbits(packed, axis=2, bitorder="little").reshape(tiles, groups, TILE, bits)
    values = (bit << np.arange(bits, dtype=np.uint8)).sum(axis=3, dtype=np.uint8)
    rows = np.ascontiguousarray(values.transpose(0, 2, 1).reshape(tiles * TILE, groups)[:n])
    return rows.view(np.int8) if bits == 8 else rows


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, format: AffineFormat) -> np.ndarray:
    """W = S · (q − Z): codes `[n, k]`, scales `[n, groups]`, zeros `[n, groups]` or None -> float32 `[n, k]`."""
    k = codes.shape[1]
    width = format.group or k
    spread = lambda a: np.repeat(a, width, axis=1)[:, :k]  # noqa: E731
    center = np.float32(format.center) if zeros is None else spread(zeros.astype(np.float32))
    return (codes.astype(np.float32) - center) * spread(scales.astype(np.float32))
