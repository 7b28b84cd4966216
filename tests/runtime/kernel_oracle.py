"""An independent statement of docs/layout.md in numpy: packing, and the arithmetic bit for bit."""

import itertools
from dataclasses import dataclass

import numpy as np

FLOAT, INT8_TOKEN, INT8_BLOCK, INT8_STATIC = 0, 1, 2, 3
BITS = (8, 4, 3, 2)
GROUPS = (32, 64, 128, 0)
ACTIVATIONS = (FLOAT, INT8_TOKEN, INT8_BLOCK, INT8_STATIC)
STATIC_SCALE, STATIC_ZERO = np.float32(0.037), -37


@dataclass(frozen=True)
class Format:
    bits: int
    group: int
    asymmetric: bool
    activation: int

    def __str__(self) -> str:
        zero = "asym" if self.asymmetric else "sym"
        return f"int{self.bits}-{zero}-g{self.group}-{('float', 'token', 'block', 'static')[self.activation]}"


FORMATS = [Format(b, g, z, a) for b, g, z, a in itertools.product(BITS, GROUPS, (False, True), ACTIVATIONS)]


@dataclass(frozen=True)
class Weight:
    """Levels, scales and zero points as numbers, and the same packed."""

    bits: int
    group: int
    q: np.ndarray  # [n, k] int64
    scale: np.ndarray  # [n, groups] float16
    zero: np.ndarray  # [n, groups] int64
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def spread(self, per_group: np.ndarray) -> np.ndarray:
        """A value per group as a value per column."""
        k = self.q.shape[1]
        return np.repeat(per_group, self.group or k, axis=1)[:, :k]

    def dense(self) -> np.ndarray:
        """W in float64, exact."""
        return self.spread(self.scale.astype(np.float64)) * (self.q - self.spread(self.zero))


def _pad(array: np.ndarray, rows: int, columns: int, value: int) -> np.ndarray:
    out = np.full((rows, columns), value, array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pack_codes(q: np.ndarray, bits: int) -> np.ndarray:
    n, k = q.shape
    unit = {8: 4, 4: 8, 3: 32, 2: 16}[bits]
    rows, columns = _up(n, 16), _up(k, unit)
    q = _pad(q, rows, columns, 0 if bits == 8 else 1 << (bits - 1)) & 0xFF
    fields = q.reshape(rows // 16, 16, columns // unit, unit // 4, 4).transpose(
        3, 0, 2, 1, 4
    )  # [field, tile, unit, 16, 4]
    if bits == 3:
        low, high = fields[0::2], fields[1::2]
        index = low | high << 3
        vectors = [index[m] | ((index[3] >> (4 - 2 * m)) & 3) << 6 for m in range(3)]
        packed = np.stack(vectors, axis=2)
    else:
        packed = sum(field << (bits * f) for f, field in enumerate(fields))
    return np.ascontiguousarray(packed.astype(np.uint8)).reshape(-1)


def pack_zeros(zero: np.ndarray, bits: int) -> np.ndarray:
    n, groups = zero.shape
    padded = _pad(zero, _up(n, 16), groups, 0)
    out = bytearray()
    for tile in padded.reshape(-1, 16, groups):
        for group in range(groups):
            word = sum((int(z) & ((1 << bits) - 1)) << (bits * r) for r, z in enumerate(tile[:, group]))
            out += word.to_bytes(2 * bits, "little")
    return np.frombuffer(bytes(out), np.uint8).copy()


def make_weight(
    rng: np.random.Generator, n: int, k: int, bits: int, group: int, asymmetric: bool, extreme=False
) -> Weight:
    """Random levels over the whole range; `extreme`: only the largest magnitudes."""
    low, high = (-128, 127) if bits == 8 else (0, (1 << bits) - 1)
    groups = -(-k // group) if group else 1
    q = rng.choice([low, high], (n, k)) if extreme else rng.integers(low, high + 1, (n, k))
    zero = np.full((n, groups), 0 if bits == 8 else 1 << (bits - 1))
    if asymmetric:
        zero = rng.choice([low, high], (n, groups)) if extreme else rng.integers(low, high + 1, (n, groups))
    scale = (rng.uniform(0.001, 0.1, (n, groups)) * rng.choice([-1, 1], (n, groups))).astype(np.float16)
    padded = _pad(scale, _up(n, 16), groups, 0)
    return Weight(
        bits, group, q, scale, zero,
        codes=pack_codes(q, bits),
        scales=np.ascontiguousarray(padded.reshape(-1, 16, groups).transpose(0, 2, 1)).reshape(-1),
        zeros=pack_zeros(zero, bits) if asymmetric else None,
    )  # fmt: skip


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fused multiply-add: the product is exact in float64, the sum is rounded to odd there, then once more."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    inexact = (error != 0) & np.isfinite(total) & (total.view(np.int64) & 1 == 0)
    toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact, toward, total).astype(np.float32)


def quantize(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 per `block` columns: levels as int64, and a float32 scale per block."""
    rows, k = x.shape
    a = np.zeros((rows, k), np.int64)
    scales = np.zeros((rows, -(-k // block)), np.float32)
    for b in range(scales.shape[1]):
        part = x[:, b * block : (b + 1) * block]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        safe = np.where(scale > 0, scale, np.float32(1))
        level = np.clip(np.rint(part / safe), -127, 127)
        a[:, b * block : (b + 1) * block] = np.where(scale > 0, level, 0)
        scales[:, b] = scale[:, 0]
    return a, scales


def static_levels(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(np.rint(x / STATIC_SCALE) + np.float32(STATIC_ZERO), -128, 127).astype(np.int64)


def static_offset(weight: Weight) -> np.ndarray:
    """What a product with levels that are all the zero point gives, taken off."""
    n, k = weight.shape
    level = weight.q - weight.spread(weight.zero)
    acc, width = np.zeros(n, np.float32), weight.group or k
    for group in range(weight.scale.shape[1]):
        dot = STATIC_ZERO * level[:, group * width : (group + 1) * width].sum(axis=1)
        acc = fma32(dot.astype(np.float32), weight.scale[:, group].astype(np.float32) * STATIC_SCALE, acc)
    return np.float32(0) - acc


def mixed(
    weight: Weight, columns: np.ndarray, outliers: np.ndarray, x: np.ndarray, activation: int, bias: np.ndarray | None
) -> np.ndarray:
    """The columns (their float16 weights `[n, columns]`) beside the product of the others, to the bit."""
    rest = x.copy()
    rest[:, columns] = 0
    y = linear(weight, rest, activation, bias)
    for j, column in enumerate(columns):
        y = y + x[:, column, None] * outliers[None, :, j].astype(np.float32)
    y[~np.isfinite(x).all(axis=1)] = np.nan
    return y


def linear(weight: Weight, x: np.ndarray, activation: int, bias: np.ndarray | None) -> np.ndarray:
    """The result to the bit."""
    n, k = weight.shape
    rows = x.shape[0]
    bad = ~np.isfinite(x).all(axis=1)
    x = np.where(bad[:, None], np.float32(0), x)
    level = weight.q - weight.spread(weight.zero)
    acc = np.zeros((rows, n), np.float32)
    if activation == FLOAT:
        group = weight.group or k
        for g in range(weight.scale.shape[1]):
            part = np.zeros((4, rows, n), np.float32)
            for column in range(g * group, min(k, (g + 1) * group)):
                w = level[None, :, column].astype(np.float32)
                part[column % 4] = fma32(w, x[:, column, None], part[column % 4])
            dot = (part[0] + part[1]) + (part[2] + part[3])
            acc = fma32(dot, weight.scale[None, :, g].astype(np.float32), acc)
    else:
        block = 128 if activation == INT8_BLOCK else k
        a, sa = quantize(x, block)
        if activation == INT8_STATIC:
            a, sa = static_levels(x), np.full((rows, 1), STATIC_SCALE)
        segment = min(weight.group or k, block)
        for s, begin in enumerate(range(0, k, segment)):
            dot = a[:, begin : begin + segment] @ level[:, begin : begin + segment].T
            assert np.abs(dot).max(initial=0) < 2**31
            group = s if weight.group else 0
            scale = weight.scale[None, :, group].astype(np.float32) * sa[:, begin // block, None]
            acc = fma32(dot.astype(np.float32), np.broadcast_to(scale, acc.shape), acc)
    if activation == INT8_STATIC:
        acc = acc + static_offset(weight)
    y = acc if bias is None else acc + bias
    y[bad] = np.nan
    return y
