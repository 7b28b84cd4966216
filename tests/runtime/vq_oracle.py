"""An independent statement of docs/layout.md for vector-quantized matrices in numpy: packing, and the arithmetic bit for bit."""

import itertools
from dataclasses import dataclass

import numpy as np

from tests.runtime.kernel_oracle import FLOAT, INT8_BLOCK, fma32, quantize

CODEBOOKS = ((1, 4), (1, 8), (1, 16), (2, 16), (2, 32), (2, 64), (2, 256), (4, 256))
ACTIVATIONS = (FLOAT, INT8_BLOCK)
# Groups against blocks: each group once, blocks that are one tile, several, all of the matrix, and of several groups.
BLOCKS = ((16, 128, 128), (32, 256, 64), (0, 0, 32), (128, 256, 0), (16, 0, 64), (0, 128, 0), (32, 256, 32))


@dataclass(frozen=True)
class VqForm:
    dim: int
    centroids: int
    block_rows: int
    block_columns: int
    group: int

    def __str__(self) -> str:
        return f"vq{self.dim}d{self.centroids}-b{self.block_rows}x{self.block_columns}-g{self.group}"

    def blocks(self, n: int, k: int) -> tuple[int, int]:
        down = -(-n // self.block_rows) if self.block_rows else 1
        return down, -(-k // self.block_columns) if self.block_columns else 1

    def groups(self, k: int) -> int:
        return -(-k // self.group) if self.group else 1


FORMS = [VqForm(*book, *block) for book, block in itertools.product(CODEBOOKS, BLOCKS)]


@dataclass(frozen=True)
class VqWeight:
    """Indices, entries and factors as numbers, and the same packed (flat arrays)."""

    form: VqForm
    index: np.ndarray  # [n, vectors] int64
    entries: np.ndarray  # [n, k] int64
    factors: np.ndarray  # [n, k] float32: S * c
    codes: np.ndarray
    codebooks: np.ndarray
    codebook_scales: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries.shape

    def dense(self) -> np.ndarray:
        """W as qc_embedding_vq gives it, float32."""
        return self.factors * self.entries.astype(np.float32)


def _padded(index: np.ndarray, rows: int, vectors: int) -> np.ndarray:
    out = np.zeros((rows, vectors), np.int64)
    out[: index.shape[0], : index.shape[1]] = index
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pack_indices(index: np.ndarray, dim: int, centroids: int) -> np.ndarray:
    """Indices `[n, vectors]`, vector 4b + i of block b -> bytes `[tiles, units, unit bytes]`, flat."""
    bits = centroids.bit_length() - 1
    # Blocks of four vectors in a unit: the four index vectors of 5 or of 6 bits in a unit count eight and four pairs.
    blocks = 8 if bits == 5 else 32 // (4 * dim) if bits // dim == 3 else 8 // bits
    rows = _up(index.shape[0], 16)
    index = _padded(index, rows, _up(index.shape[1], 4 * blocks))
    unit = index.reshape(rows // 16, 16, -1, blocks, 4).transpose(3, 0, 2, 1, 4)  # [block, tile, unit, 16, 4]
    if bits == 5:
        high = [unit[5] & 7, unit[6] & 7, unit[7] & 7, unit[5] >> 3 | (unit[7] >> 3 & 1) << 2, unit[6] >> 3 | (unit[7] >> 4) << 2]
        vectors = [unit[m] | high[m] << 5 for m in range(5)]
    elif bits // dim == 3:
        pair = unit if dim == 2 else [unit[2 * m] | unit[2 * m + 1] << 3 for m in range(4)]
        vectors = [pair[m] | (pair[3] >> (4 - 2 * m) & 3) << 6 for m in range(3)]
    else:
        vectors = [sum(unit[b] << (bits * b) for b in range(blocks))]
    return np.ascontiguousarray(np.stack(vectors, axis=2).astype(np.uint8)).reshape(-1)


def make_weight(rng: np.random.Generator, form: VqForm, n: int, k: int, extreme: bool = False) -> VqWeight:
    """Random indices and entries over the whole range; `extreme`: only the entries of the largest magnitudes."""
    span, (down, across) = 4 * form.dim, form.blocks(n, k)
    index = rng.integers(0, form.centroids, (n, -(-k // span) * 4))
    size = (down, across, form.dim, form.centroids)
    books = (rng.choice([-128, 127], size) if extreme else rng.integers(-128, 128, size)).astype(np.int8)
    c = rng.uniform(0.01, 2, (down, across)).astype(np.float16)
    s = (rng.uniform(0.001, 0.1, (n, form.groups(k))) * rng.choice([-1, 1], (n, form.groups(k)))).astype(np.float16)

    row, column = np.arange(n)[:, None], np.arange(k)[None, :]
    r = row // form.block_rows if form.block_rows else row * 0
    b = column // form.block_columns if form.block_columns else column * 0
    vector = column // span * 4 + column % 4
    entries = books[r, b, column % span // 4, index[row, vector]].astype(np.int64)
    factors = s[row, column // form.group if form.group else column * 0].astype(np.float32) * c[r, b].astype(np.float32)
    padded = np.zeros((_up(n, 16), s.shape[1]), np.float16)
    padded[:n] = s
    return VqWeight(
        form, index, entries, factors,
        codes=pack_indices(index, form.dim, form.centroids),
        codebooks=books.reshape(-1),
        codebook_scales=c.reshape(-1),
        scales=np.ascontiguousarray(padded.reshape(-1, 16, s.shape[1]).transpose(0, 2, 1)).reshape(-1),
    )  # fmt: skip


def linear(weight: VqWeight, x: np.ndarray, activation: int, bias: np.ndarray | None) -> np.ndarray:
    """The result to the bit."""
    n, k = weight.shape
    rows, segment = len(x), weight.form.group or 128
    bad = ~np.isfinite(x).all(axis=1)
    x = np.where(bad[:, None], np.float32(0), x)
    a, sa = quantize(x, 128)
    acc = np.zeros((rows, n), np.float32)
    for begin in range(0, k, segment):
        columns = range(begin, min(k, begin + segment))
        factor = weight.factors[None, :, begin]
        if activation == FLOAT:
            part = np.zeros((4, rows, n), np.float32)
            for column in columns:
                entry = weight.entries[None, :, column].astype(np.float32)
                part[column % 4] = fma32(entry, x[:, column, None], part[column % 4])
            dot, scale = (part[0] + part[1]) + (part[2] + part[3]), np.broadcast_to(factor, acc.shape)
        else:
            dot = (a[:, columns] @ weight.entries[:, columns].T).astype(np.float32)
            scale = factor * sa[:, begin // 128, None]
        acc = fma32(dot, scale, acc)
    y = acc if bias is None else acc + bias
    y[bad] = np.nan
    return y
