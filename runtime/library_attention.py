"""The op library's attention, for torch: on addresses, with the whole cache in one piece. Needs numpy only."""

from __future__ import annotations

import ctypes

from qcompiler.runtime import library


class AttentionCall(ctypes.Structure):
    """`qc_attention_call` of runtime/cpu/qcompiler_ops.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_size", "rotary", "interleaved", "window")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "past")),
        *((name, ctypes.c_void_p) for name in "qkv"),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("past_key", "past_value")),
        ("past_capacity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("present_key", "present_value")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        ("rotary_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("positions", "bias")),
        *((name, ctypes.c_int64) for name in ("bias_head_stride", "bias_row_stride")),
        ("y", ctypes.c_void_p),
    ]


def attention_pointers(
    q: int, new_key: int, new_value: int, key: int, value: int, bias: int | None, y: int, *, heads: int, kv_heads: int,
    head: int, rows: int, total: int, scale: float, bias_heads: int = 1, threads: int | None = None, isa: str | None = None,
) -> None:  # fmt: skip
    """Attention of the last `rows` of `total` positions; nothing is rotated or checked here.

    Args:
        q, y: float32 `[rows, heads, head]`.
        new_key, new_value: float32 `[rows, kv_heads, head]`: the last rows of the cache once more. They are written there again.
        key, value: float32 `[kv_heads, total, head]`.
        bias: float32 `[bias_heads, rows, total]`, `bias_heads` 1 or `heads`.
        scale: of the scores.
    """
    lib = library.load()
    call = AttentionCall(
        heads=heads, kv_heads=kv_heads, head_size=head, scale=scale, rows=rows, past=total - rows, q=q, k=new_key, v=new_value,
        q_stride=heads * head, k_stride=kv_heads * head, v_stride=kv_heads * head, past_key=key, past_value=value,
        past_capacity=total, present_key=key, present_value=value, capacity=total, bias=bias,
        bias_head_stride=rows * total if bias_heads > 1 else 0, bias_row_stride=total, y=y,
    )  # fmt: skip
    context = library._context(lib, threads, isa)
    library._call(lib, lib.qc_attention, ctypes.byref(context), ctypes.byref(call))
