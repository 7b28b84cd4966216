"""`qcompiler::attention`: scaled dot-product attention of one sequence over its cache, by the op library's arithmetic.

What `GroupQueryAttention` of domain `ai.qcompiler` computes once queries and keys are rotated (docs/layout.md, "Attention"): a
program of target `torch` and an ONNX model give the same bits. On other devices than the CPU it is torch's own attention.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("qcompiler", "FRAGMENT")
_SCHEMA = "attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor"
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

# Masks of floats hide by the lowest of a type rather than by −infinity: a score is nothing beside it.
_HIDDEN = -1e30


def hides_later(mask: torch.Tensor) -> bool:
    """Whether no row sees a position after its own, that of the last row being the last.

    Args:
        mask: `[..., rows, positions]`, bool (true: seen) or a bias of floats.
    """
    rows, total = mask.shape[-2:]
    later = torch.ones(rows, total, dtype=torch.bool, device=mask.device).triu(total - rows + 1)
    return not ((mask if mask.dtype == torch.bool else mask > _HIDDEN) & later).any()


def _check(q, k, v, mask) -> None:
    torch._check(
        q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == 1 and k.shape == v.shape and q.shape[3] == k.shape[3],
        lambda: f"attention: q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}, expected [1, heads, rows, head] and "
        "[1, kv heads, positions, head] of one sequence",
    )
    torch._check(
        q.shape[1] % k.shape[1] == 0,
        lambda: f"attention: {q.shape[1]} heads, expected a multiple of the {k.shape[1]} of k and v",
    )
    torch._check(
        mask.dim() == 4 and mask.shape[0] == 1 and mask.shape[1] in (1, q.shape[1]),
        lambda: f"attention: mask is {list(mask.shape)}, expected [1, 1 or {q.shape[1]}, rows, positions]",
    )


def _cpu(q, k, v, mask, scale):
    """CPU kernel.

    Raises:
        RuntimeError: tensors that do not fit, or are not float32; a mask by which a row sees a position after its own.
    """
    from qcompiler.runtime.library_attention import attention_pointers

    _check(q, k, v, mask)
    (heads, rows, head), (kv_heads, total) = q.shape[1:], k.shape[1:3]
    torch._check(
        q.dtype == k.dtype == v.dtype == torch.float32,
        lambda: f"attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected float32 on the CPU",
    )
    torch._check(
        mask.shape[2:] == (rows, total),
        lambda: f"attention: mask is {list(mask.shape)}, expected {rows} rows of {total} positions",
    )
    torch._check(hides_later(mask), lambda: "attention: by the mask a row sees a position after its own, which the op leaves out")
    by_row = lambda x: x[0].transpose(0, 1).contiguous()  # noqa: E731
    key, value = k.contiguous(), v.contiguous()
    queries, new_key, new_value = by_row(q), by_row(key[:, :, total - rows :]), by_row(value[:, :, total - rows :])
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    else:
        bias = mask.to(torch.float32).contiguous()
    y = torch.empty(rows, heads, head)
    if y.numel():
        attention_pointers(
            queries.data_ptr(), new_key.data_ptr(), new_value.data_ptr(), key.data_ptr(), value.data_ptr(), bias.data_ptr(),
            y.data_ptr(), heads=heads, kv_heads=kv_heads, head=head, rows=rows, total=total, scale=scale,
            bias_heads=mask.shape[1], threads=torch.get_num_threads(),
        )  # fmt: skip
    return y.transpose(0, 1)[None]


def _elsewhere(q, k, v, mask, scale):
    """Torch's own, on the device of its tensors."""
    _check(q, k, v, mask)
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    (heads, rows, head), (kv_heads, total) = q.shape[1:], k.shape[1:3]
    shared = heads // kv_heads
    if shared > 1:
        # Heads that share keys are rows of one head: no kernel is in need of a copy of k and v for each of them.
        q = q.reshape(1, kv_heads, shared * rows, head)
        if mask.shape[1] > 1:
            mask = mask.reshape(1, kv_heads, shared * rows, total)
        else:
            mask = mask.expand(1, shared, rows, total).reshape(1, 1, shared * rows, total) if rows > 1 else mask
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return found.reshape(1, heads, rows, head).transpose(1, 2).contiguous().transpose(1, 2)


def _fake(q, k, v, mask, scale):
    heads, rows, head = q.shape[1:]
    return q.new_empty((1, rows, heads, head)).transpose(1, 2)


_library.impl("attention", _cpu, "CPU")
_library.impl("attention", _elsewhere, "CUDA")
torch.library.register_fake("qcompiler::attention", _fake, lib=_library)

ATTENTION = torch.ops.qcompiler.attention.default
