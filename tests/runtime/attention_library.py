"""ctypes binding of qc_attention on numpy arrays, and attention in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qcompiler.runtime.library_attention import AttentionCall
from tests.runtime.kernel_library import Library

# What compare_attention prints of its first 60 cases, on every machine: the arithmetic of docs/layout.md.
DIGEST = "digest 498835eb4e8ea686"


@dataclass
class Attention:
    """One call: new q [rows, heads, head], k and v [rows, kv_heads, head] behind `past` positions of the cache.

    Attributes:
        key, value: the cache [kv_heads, capacity, head].
        cosines, sines: [positions, rotary / 2], None: nothing is rotated.
        positions: int64 [rows], None: past, past + 1, ...
        bias: [1 or heads, rows, at least past + rows].
        window: positions that a row sees; 0: all.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past: int
    cosines: np.ndarray | None = None
    sines: np.ndarray | None = None
    positions: np.ndarray | None = None
    bias: np.ndarray | None = None
    window: int = 0
    scale: float = 0.25
    interleaved: bool = False

    @property
    def total(self) -> int:
        return self.past + len(self.q)

    def rows(self, begin: int, end: int) -> Attention:
        """The call for some of the rows, those before it done: it changes the same cache."""
        cut = lambda array: None if array is None else np.ascontiguousarray(array[begin:end])  # noqa: E731
        bias = None if self.bias is None else np.ascontiguousarray(self.bias[:, begin:end])
        return replace(
            self, q=cut(self.q), k=cut(self.k), v=cut(self.v), past=self.past + begin, positions=cut(self.positions), bias=bias
        )

    def with_own_cache(self) -> Attention:
        return replace(self, key=self.key.copy(), value=self.value.copy())


def make_attention(
    rng: np.random.Generator, *, kv_heads: int = 2, group: int = 3, head: int = 16, past: int = 5, rows: int = 1, room: int = 3,
    rotary: int = 0, own_positions: bool = False, bias_heads: int = 0, **more,
) -> Attention:  # fmt: skip
    """Random arrays; what the cache holds behind `past` is not a number, and must not be read."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    total, heads = past + rows, kv_heads * group
    key, value = normal(kv_heads, total + room, head), normal(kv_heads, total + room, head)
    key[:, past:] = value[:, past:] = np.nan
    tables = [normal(total + 2, rotary // 2) for _ in range(2)] if rotary else [None, None]
    positions = rng.integers(0, total + 2, rows) if own_positions else None
    bias = normal(bias_heads, rows, total + 1) if bias_heads else None
    new = (normal(rows, heads, head), normal(rows, kv_heads, head), normal(rows, kv_heads, head))
    return Attention(*new, key, value, past, *tables, positions, bias, **more)


def call(
    library: Library, attention: Attention, *, isa: str | None = None, threads: int = 1, place: Callable = lambda array: array,
    elsewhere: int | None = None, **fields,
) -> np.ndarray:  # fmt: skip
    """y [rows, heads, head]; the cache of `attention` is changed, or with `elsewhere` (its capacity) a new one is made and its
    filled part returned as well. `fields` replace what the call says."""
    a = attention
    (rows, heads, head), kv_heads = a.q.shape, a.k.shape[1]
    keep = {name: None if (array := getattr(a, name)) is None else place(array) for name in _ARRAYS}
    capacity = a.key.shape[1] if elsewhere is None else elsewhere
    present = [keep["key"], keep["value"]]
    if elsewhere is not None:
        present = [place(np.full((kv_heads, capacity, head), np.nan, np.float32)) for _ in range(2)]
    y = place(np.full(a.q.shape, -7, np.float32))
    address = lambda array: None if array is None or not array.size else array.ctypes.data  # noqa: E731
    said = {
        "heads": heads, "kv_heads": kv_heads, "head_size": head, "interleaved": a.interleaved, "window": a.window,
        "rotary": 0 if a.cosines is None else 2 * a.cosines.shape[1], "scale": a.scale, "rows": rows, "past": a.past,
        **{name: address(keep[name]) for name in ("q", "k", "v", "cosines", "sines", "positions", "bias")},
        "q_stride": heads * head, "k_stride": kv_heads * head, "v_stride": kv_heads * head,
        "past_key": address(keep["key"]), "past_value": address(keep["value"]), "past_capacity": a.key.shape[1],
        "present_key": address(present[0]), "present_value": address(present[1]), "capacity": capacity,
        "rotary_rows": 0 if a.cosines is None else len(a.cosines), "y": address(y),
        "bias_head_stride": 0 if a.bias is None or len(a.bias) == 1 else a.bias[0].size,
        "bias_row_stride": 0 if a.bias is None else a.bias.shape[2],
    }  # fmt: skip
    library.c.qc_attention.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    context, structure = library.context(isa, threads), AttentionCall(**said | fields)
    if threads > 1:
        library.c.qc_pool_set_threads(threads)
    library.check(library.c.qc_attention(ctypes.addressof(context), ctypes.addressof(structure)))
    for name, array in zip(("key", "value"), present, strict=True):
        if elsewhere is not None:
            setattr(attention, name, array)
        elif array is not getattr(a, name):
            getattr(a, name)[...] = array
    return y


_ARRAYS = ("q", "k", "v", "key", "value", "cosines", "sines", "positions", "bias")


def rotated(x: np.ndarray, a: Attention) -> np.ndarray:
    """[rows, heads, head] in float64, its leading columns rotated."""
    out = x.astype(np.float64)
    if a.cosines is None or a.sines is None:
        return out
    at = np.arange(a.past, a.total) if a.positions is None else a.positions
    cosine, sine = (table.astype(np.float64)[at][:, None] for table in (a.cosines, a.sines))
    half = a.cosines.shape[1]
    one, two = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if a.interleaved else (slice(half), slice(half, 2 * half))
    first, second = out[..., one].copy(), out[..., two].copy()
    out[..., one], out[..., two] = first * cosine - second * sine, second * cosine + first * sine
    return out


def in_float64(a: Attention) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, and the filled cache after the call, all in float64."""
    group = a.q.shape[1] // a.k.shape[1]
    whole = lambda cache, new: np.concatenate([cache[:, : a.past].astype(np.float64), new.transpose(1, 0, 2)], 1)  # noqa: E731
    keys, values = whole(a.key, rotated(a.k, a)), whole(a.value, a.v.astype(np.float64))
    scores = np.einsum("rhd,hpd->hrp", rotated(a.q, a), keys.repeat(group, 0)) * np.float64(np.float32(a.scale))
    if a.bias is not None:
        scores = scores + a.bias[..., : a.total]
    distance = np.arange(a.past, a.total)[:, None] - np.arange(a.total)
    scores = np.where((distance >= 0) & ((distance < a.window) | (a.window == 0)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hrp,hpd->rhd", weights, values.repeat(group, 0)), keys, values


def doubt(a: Attention) -> float:
    """How far floats may be from float64: a score by a few last bits of the largest sum of magnitudes that one is the rest of, a
    weight by as much relatively, and so the result as a share of the largest value."""
    keys = np.concatenate([a.key[:, : a.past].astype(np.float64), rotated(a.k, a).transpose(1, 0, 2)], 1)
    group = a.q.shape[1] // a.k.shape[1]
    largest = np.einsum("rhd,hpd->hrp", np.abs(rotated(a.q, a)), np.abs(keys).repeat(group, 0)).max() * a.scale
    values = max(np.abs(a.value[:, : a.past]).max(initial=0), np.abs(a.v).max())
    return 2.0**-24 * (8 + 4 * largest) * float(values)
