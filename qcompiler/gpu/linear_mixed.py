"""`linear_mixed` (LLM.int8() with fixed columns) on a GPU: the product without the outlier columns, which come with the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device, edges
from qcompiler.gpu.linear_nbit import checked, product
from qcompiler.gpu.weight import expect
from qcompiler.ops import layout
from qcompiler.ops.formats import Activation


@triton.jit(do_not_specialize=("count",))
def _clear(x_ptr, column_ptr, k, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(column_ptr + item, mask=item < count, other=-1)
    tl.store(x_ptr + row * k + column, tl.zeros([BLOCK], x_ptr.dtype.element_ty), mask=(column >= 0) & (column < k))


def without(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x `[rows, k]` with 0 in the columns; those outside are left alone here, and give NaN in `edges.finish`."""
    if not columns.numel() or not x.shape[0]:
        return x
    rest = x.clone()
    block = min(256, triton.next_power_of_2(columns.numel()))
    with device.on(x.device):
        _clear[(x.shape[0], triton.cdiv(columns.numel(), block))](rest, columns, x.shape[1], columns.numel(), BLOCK=block)
    return rest


def linear_mixed(
    x, codes, scales, zeros, columns, outliers, bias, activation_scale, activation_zero, activation_offset, bits, group, n,
    k, activation, layout_version,
):  # fmt: skip
    """CUDA implementation of `qcompiler::linear_mixed`: x float32, float16 or bfloat16 `[..., k]`, y of its dtype.

    Raises:
        InputError, UnsupportedError: as `linear_nbit`.
    """
    op, kind, place = "linear_mixed", Activation(activation), x.device
    weight = checked(
        op, x, codes, scales, zeros, bias, activation_scale, activation_zero, activation_offset, bits, group, n, k, kind
    )
    expect(op, "columns", columns, torch.int32, (columns.numel(),), place)
    expect(op, "outliers", outliers, torch.float16, layout.outliers_shape(n, columns.numel()), place)
    rows = x.reshape(-1, k).contiguous()
    if not rows.shape[0]:
        return x.new_empty((*x.shape[:-1], n))
    columns = columns.contiguous()
    partial, integer = product(
        op, without(rows, columns), weight, kind, range_scale=activation_scale, range_zero=activation_zero
    )
    extra = edges.Outliers(rows, columns, outliers.contiguous()) if columns.numel() else None
    y = edges.finish(partial, n, x.dtype, bias=bias, offset=activation_offset, integer=integer, outliers=extra)
    return y.reshape(*x.shape[:-1], n)
