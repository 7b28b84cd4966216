"""The packed layout of vector-quantized weights (docs/layout.md): pack, unpack and byte counts, in numpy.

An index is `dim` fields side by side, field j for column j of its vector, and the fields lie as the codes of an affine weight
of as many bits do. Indices of 5 bits do not divide into fields and have a unit of their own.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ops import layout
from qcompiler.ops.formats import TILE, VqFormat

FIVE_BITS_K = 64  # columns of a unit of 5-bit indices of pairs
FIVE_BITS_BYTES = 320


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def field_bits(format: VqFormat) -> int | None:
    """Bits of an index for each column of its vector; None where that is no whole number."""
    bits, rest = divmod(format.index_bits, format.dim)
    return None if rest else bits


def unit_columns(format: VqFormat) -> int:
    """Columns of a unit of `codes`: whole spans, and a divisor of 128."""
    bits = field_bits(format)
    return FIVE_BITS_K if bits is None else layout.UNIT_K[bits]


def codes_shape(n: int, k: int, format: VqFormat) -> tuple[int, int, int]:
    """Shape of `codes`, uint8: `[tiles, units, unit_bytes]`."""
    bits = field_bits(format)
    size = FIVE_BITS_BYTES if bits is None else layout.UNIT_BYTES[bits]
    return _ceil(n, TILE), _ceil(k, unit_columns(format)), size


def scales_shape(n: int, k: int, format: VqFormat) -> tuple[int, int, int]:
    """Shape of `scales`, float16: `[tiles, groups, 16]`."""
    return _ceil(n, TILE), format.groups(k), TILE


def codebooks_shape(n: int, k: int, format: VqFormat) -> tuple[int, int, int, int]:
    """Shape of `codebooks`, int8: `[blocks down, blocks across, dim, centroids]`."""
    return (*format.blocks(n, k), format.dim, format.centroids)


def packed_bytes(n: int, k: int, format: VqFormat) -> dict[str, int]:
    """Bytes of a packed matrix `[n, k]` by what they are; the values sum to the size of its tensors.

    Keys: `codes`, `scales` (of the n x k weights alone, fractions of a byte rounded up), `codebooks` (with a float16 scale
    each), `padding` (the rest of tiles and units).
    """
    down, across = format.blocks(n, k)
    stored = int(np.prod(codes_shape(n, k, format))) + 2 * int(np.prod(scales_shape(n, k, format)))
    codes, scales = _ceil(n * k * format.index_bits, 8 * format.dim), 2 * n * format.groups(k)
    codebooks = down * across * (format.dim * format.centroids + 2)
    return {"codes": codes, "scales": scales, "codebooks": codebooks, "padding": stored - codes - scales}


def _expect(what: str, array: np.ndarray, shape: tuple[int, ...], n: int, k: int, format: VqFormat) -> None:
    if array.shape != shape:
        raise ValueError(f"{what} of a {n} x {k} matrix in {format.label} are {list(shape)}, found {list(array.shape)}")


def pack_indices(indices: np.ndarray, k: int, format: VqFormat) -> np.ndarray:
    """Indices `[n, vectors]` -> `codes`, uint8 `[tiles, units, unit_bytes]`.

    Raises:
        ValueError: an index that names no entry; not as many vectors as k columns have.
    """
    n = len(indices)
    _expect("indices", indices, (n, format.vectors(k)), n, k, format)
    if indices.size and (indices.min() < 0 or indices.max() >= format.centroids):
        found = f"[{indices.min()}, {indices.max()}]"
        raise ValueError(f"indices into {format.centroids} entries lie in [0, {format.centroids - 1}], found {found}")
    indices = indices.astype(np.uint8)
    bits = field_bits(format)
    if bits is None:
        return _pack_five_bits(indices)
    shifts = np.arange(format.dim, dtype=np.uint8) * bits
    fields = indices.reshape(n, -1, 1, 4) >> shifts[:, None] & (1 << bits) - 1  # [n, spans, dim, 4]
    return layout.pack_codes(fields.reshape(n, -1), bits)


def unpack_indices(codes: np.ndarray, n: int, k: int, format: VqFormat) -> np.ndarray:
    """The inverse of `pack_indices`: uint8 `[n, vectors]`."""
    _expect("codes", codes, codes_shape(n, k, format), n, k, format)
    vectors, bits = format.vectors(k), field_bits(format)
    if bits is None:
        return _unpack_five_bits(codes, n, vectors)
    fields = layout.unpack_codes(codes, n, vectors * format.dim, bits).reshape(n, -1, format.dim, 4)
    shifts = np.arange(format.dim, dtype=np.uint8) * bits
    return np.bitwise_or.reduce(fields << shifts[:, None], axis=2).reshape(n, vectors)


def _pack_five_bits(indices: np.ndarray) -> np.ndarray:
    """uint8 `[n, vectors]` -> uint8 `[tiles, units, 320]`; what lies beyond is index 0."""
    n, vectors = indices.shape
    tiles, units = _ceil(n, TILE), _ceil(vectors, 32)
    padded = np.zeros((tiles * TILE, units * 32), np.uint8)
    padded[:n, :vectors] = indices
    unit = padded.reshape(tiles, TILE, units, 8, 4).transpose(3, 0, 2, 1, 4)  # [8, tiles, units, row, 4]
    i = unit.reshape(8, tiles, units, 64)
    parts = [
        i[0] | (i[5] & 7) << 5,
        i[1] | (i[6] & 7) << 5,
        i[2] | (i[7] & 7) << 5,
        i[3] | (i[5] >> 3) << 5 | (i[7] >> 3 & 1) << 7,
        i[4] | (i[6] >> 3) << 5 | (i[7] >> 4) << 7,
    ]
    return np.concatenate(parts, axis=2)


def _unpack_five_bits(codes: np.ndarray, n: int, vectors: int) -> np.ndarray:
    tiles, units, _ = codes.shape
    v = codes.reshape(tiles, units, 5, 64).transpose(2, 0, 1, 3)
    extra = [
        v[0] >> 5 | (v[3] >> 5 & 3) << 3,
        v[1] >> 5 | (v[4] >> 5 & 3) << 3,
        v[2] >> 5 | (v[3] >> 7) << 3 | (v[4] >> 7) << 4,
    ]
    i = np.stack([*(v & 31), *extra]).reshape(8, tiles, units, TILE, 4)
    return np.ascontiguousarray(i.transpose(1, 3, 2, 0, 4).reshape(tiles * TILE, units * 32)[:n, :vectors])


def pack_codebooks(codebooks: np.ndarray) -> np.ndarray:
    """Integers `[blocks down, blocks across, centroids, dim]` -> int8 `[blocks down, blocks across, dim, centroids]`.

    Raises:
        ValueError: an entry beyond int8.
    """
    if codebooks.size and (codebooks.min() < -128 or codebooks.max() > 127):
        found = f"[{codebooks.min()}, {codebooks.max()}]"
        raise ValueError(f"entries of codebooks lie in [-128, 127], found {found}")
    if not np.array_equal(codebooks, np.trunc(codebooks)):
        raise ValueError("entries of codebooks are whole numbers, found fractions")
    return np.ascontiguousarray(codebooks.astype(np.int8).transpose(0, 1, 3, 2))


def unpack_codebooks(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_codebooks`."""
    return np.ascontiguousarray(packed.transpose(0, 1, 3, 2))


def _half(what: str, values: np.ndarray) -> np.ndarray:
    """Values as float16.

    Raises:
        ValueError: one that is not finite there.
    """
    with np.errstate(over="ignore"):
        halves = np.asarray(values).astype(np.float16)
    if not np.isfinite(halves).all():
        worst = np.asarray(values)[~np.isfinite(halves)].flat[0]
        raise ValueError(f"{what} are finite and at most {layout.LARGEST_HALF:g}, found {worst:g}")
    return halves


def pack(
    indices: np.ndarray, codebooks: np.ndarray, codebook_scales: np.ndarray, scales: np.ndarray, k: int, format: VqFormat
) -> dict[str, np.ndarray]:
    """The four tensors of a packed matrix, by the names of the op's inputs.

    Args:
        indices: `[n, vectors]`.
        codebooks: `[blocks down, blocks across, centroids, dim]`.
        codebook_scales: c, `[blocks down, blocks across]`.
        scales: S, `[n, groups]`.
        k: columns of the matrix.
        format: of the matrix.

    Raises:
        ValueError: a shape that does not fit n, k and format; an index that names no entry; an entry beyond int8; a scale
            that is not finite in float16.
    """
    n = len(indices)
    blocks = format.blocks(n, k)
    _expect("codebooks", codebooks, (*blocks, format.centroids, format.dim), n, k, format)
    _expect("scales of codebooks", codebook_scales, blocks, n, k, format)
    _expect("scales", scales, (n, format.groups(k)), n, k, format)
    return {
        "codes": pack_indices(indices, k, format),
        "codebooks": pack_codebooks(codebooks),
        "codebook_scales": _half("scales of codebooks", codebook_scales),
        "scales": layout.pack_scales(_half("scales", scales)),
    }


def levels(indices: np.ndarray, codebooks: np.ndarray, k: int, format: VqFormat) -> np.ndarray:
    """The codebook entry of every weight, int8 `[n, k]`; codebooks are `[blocks down, blocks across, centroids, dim]`."""
    n = len(indices)
    span = np.arange(format.vectors(k)) // 4 * format.span  # first column of each vector's span
    down, across = np.arange(n) // (format.block_rows or n), span // (format.block_columns or k)
    entries = codebooks[down[:, None], across, indices]  # [n, vectors, dim]
    spans = entries.reshape(n, -1, 4, format.dim).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(spans.reshape(n, -1)[:, :k])


def factors(codebook_scales: np.ndarray, scales: np.ndarray, k: int, format: VqFormat) -> np.ndarray:
    """S · c of every weight, float32 `[n, k]`; exact."""
    n = len(scales)
    own = np.repeat(scales.astype(np.float32), format.group or k, axis=1)[:, :k]
    shared = codebook_scales[np.arange(n) // (format.block_rows or n)].astype(np.float32)
    return own * np.repeat(shared, format.block_columns or k, axis=1)[:, :k]


def dequantize(
    indices: np.ndarray, codebooks: np.ndarray, codebook_scales: np.ndarray, scales: np.ndarray, k: int, format: VqFormat
) -> np.ndarray:
    """W = (S · c) · C[index], float32 `[n, k]`; the arguments are those of `pack`."""
    return factors(codebook_scales, scales, k, format) * levels(indices, codebooks, k, format).astype(np.float32)
