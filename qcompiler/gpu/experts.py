"""`linear_experts_nbit` on a GPU: a few rows each read their own expert's matrix; more are sorted by expert first."""

from __future__ import annotations

import torch

from qcompiler.errors import InputError
from qcompiler.gpu import device, edges
from qcompiler.gpu.linear_nbit import check_sums, product
from qcompiler.gpu.weight import expect, packed
from qcompiler.ops.formats import Activation


def linear_experts_nbit(x, expert, codes, scales, zeros, bias, bits, group, experts, n, k, activation, layout_version):
    """CUDA implementation of `qcompiler::linear_experts_nbit`: x float32, float16 or bfloat16 `[rows, k]`, y of its dtype.

    Raises:
        InputError, UnsupportedError: as `linear_nbit`.
        RuntimeError: an expert outside `[0, experts)`; on a GPU at the next synchronization.
    """
    op = "linear_experts_nbit"
    device.require(x.device, op, x.dtype)
    if x.dim() != 2 or x.shape[1] != k:
        raise InputError(f"{op}: x is {list(x.shape)}, expected [rows, {k}]")
    kind = Activation(activation)
    if kind is Activation.INT8_STATIC:
        raise InputError(f"{op}: takes no int8-static activations")
    weight = packed(op, codes, scales, zeros, bits, group, n, k, x.device, experts)
    check_sums(op, weight, kind, False)
    expect(op, "expert", expert, torch.int64, (x.shape[0],), x.device)
    expect(op, "bias", bias, torch.float32, (experts, n), x.device)
    if not x.shape[0]:
        return x.new_empty((0, n))
    torch._assert_async(((expert >= 0) & (expert < experts)).all(), f"{op}: an expert is outside [0, {experts})")
    expert = expert.contiguous()
    partial, _ = product(op, x.contiguous(), weight, kind, expert=expert)
    return edges.finish(partial, n, x.dtype, bias=bias, expert=expert)
