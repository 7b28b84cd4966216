"""What happens to a product after its sum: scales of an integer product, offset, bias, outlier columns, gate, residual.

One kernel adds the partial sums of a split K in order, so that the result is the same in every run, and does the rest in
float32. (The norm before the product is in `activations`.)

    P[m, c] = Σ_s partial[s, m, c]  (· S[c] · sa[m] of an int32 product)  + offset[c] + bias[c] + Σ_o x[m, column_o] · w_o[c]
    y[m, c] = act(P[m, c]) · P[m, h + c]  + residual[m, c]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device
from qcompiler.gpu.activations import finite_or_nan
from qcompiler.ops.linear_edges import Gate

SILU = tl.constexpr(int(Gate.SILU))
GELU_TANH = tl.constexpr(int(Gate.GELU_TANH))


@triton.jit
def _act(x, GATE: tl.constexpr):
    """The activation of a gate, in float32; −0 at −infinity, as the formulas of docs/layout.md have it."""
    if GATE == SILU:
        bounded = tl.maximum(x, -80.0)
        y = x / (1.0 + tl.exp(-bounded))
    elif GATE == GELU_TANH:
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-tl.minimum(tl.maximum(u, -80.0), 80.0)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(x < -80.0, -0.0, tl.where(x == x, y, x))


@triton.jit
def _product(
    partial_ptr, scale_ptr, zero_ptr, row_scale_ptr, row_sum_ptr, offset_ptr, bias_ptr, x_ptr, column_ptr, outlier_ptr,
    row, bias_row, columns, mask, splits, split_stride, width, n, k, outliers,
    INTEGER: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    total = tl.load(partial_ptr + row * width + columns, mask=mask, other=0)
    if INTEGER:
        if ZERO:
            total -= tl.load(zero_ptr + columns, mask=mask, other=0).to(tl.int32) * tl.load(row_sum_ptr + row)
        factor = tl.load(scale_ptr + columns, mask=mask, other=0.0).to(tl.float32) * tl.load(row_scale_ptr + row)
        total = total.to(tl.float32) * factor
    else:
        total = total.to(tl.float32)
        for split in range(1, splits):
            begin = (row * 0 + split) * split_stride + row * width  # 64 bits
            total += tl.load(partial_ptr + begin + columns, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        total += tl.load(offset_ptr + columns, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + bias_row * n + columns, mask=mask, other=0.0).to(tl.float32)
    if MIXED:
        for o in range(0, outliers):
            column = tl.load(column_ptr + o)
            inside = (column >= 0) & (column < k)  # a column elsewhere gives NaN, and is not read
            value = finite_or_nan(tl.load(x_ptr + row * k + column, mask=inside, other=float("nan")).to(tl.float32))
            place = (columns // 16) * (outliers * 16) + o * 16 + columns % 16
            total += value * tl.load(outlier_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=("splits", "outliers"))
def _finish(
    partial_ptr, scale_ptr, zero_ptr, row_scale_ptr, row_sum_ptr, offset_ptr, bias_ptr, expert_ptr, x_ptr, column_ptr,
    outlier_ptr, residual_ptr, y_ptr, splits, split_stride, width, n, k, h, outliers,
    INTEGER: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, EXPERT: tl.constexpr,
    MIXED: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < h
    bias_row = row * 0
    if EXPERT:
        bias_row = tl.load(expert_ptr + row)
    y = _product(
        partial_ptr, scale_ptr, zero_ptr, row_scale_ptr, row_sum_ptr, offset_ptr, bias_ptr, x_ptr, column_ptr, outlier_ptr,
        row, bias_row, columns, mask, splits, split_stride, width, n, k, outliers, INTEGER, ZERO, OFFSET, BIAS, MIXED,
    )  # fmt: skip
    if GATE:
        second = _product(
            partial_ptr, scale_ptr, zero_ptr, row_scale_ptr, row_sum_ptr, offset_ptr, bias_ptr, x_ptr, column_ptr,
            outlier_ptr, row, bias_row, columns + h, mask, splits, split_stride, width, n, k, outliers, INTEGER, ZERO,
            OFFSET, BIAS, MIXED,
        )  # fmt: skip
        y = _act(y, GATE) * second
    if RESIDUAL:
        y += tl.load(residual_ptr + row * h + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * h + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class IntegerScales:
    """What turns an int32 product of whole rows into numbers: `dot · S[n] · sa[row]`, `dot` corrected by `Z[n] · Σ a[row]`.

    Attributes:
        scales: float16, S of the rows of the weight side by side (`[tiles, 1, 16]`).
        zeros: int8 alike, or None.
        row_scale: float32 `[rows]`.
        row_sum: int32 `[rows]`, given with zeros.
    """

    scales: torch.Tensor
    row_scale: torch.Tensor
    zeros: torch.Tensor | None = None
    row_sum: torch.Tensor | None = None


@dataclass(frozen=True)
class Outliers:
    """Columns of x in float beside the product: x `[rows, k]`, columns int32 `[o]`, weights float16 `[tiles, o, 16]`."""

    x: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor


def finish(
    partial: torch.Tensor,
    n: int,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
    offset: torch.Tensor | None = None,
    integer: IntegerScales | None = None,
    outliers: Outliers | None = None,
    expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """y of the partial sums.

    Args:
        partial: `[splits, rows, width]`, width at least n: float32, float16 or bfloat16, or int32 with `integer` and one split.
        n: rows of the weight.
        dtype: of y.
        bias: float32 `[n]`, or `[experts, n]` with `expert`.
        residual: `[rows, h]`, contiguous, h the columns of y.
        gate: a `Gate`; h = n / 2 where it is not 0.
        offset: float32 `[n]`, of static activations with a zero point.
        expert: int64 `[rows]`, which row of the bias.

    Returns:
        `[rows, h]`.
    """
    splits, rows, width = partial.shape
    h = n // 2 if gate else n
    y = partial.new_empty((rows, h), dtype=dtype)
    if not y.numel():
        return y
    block = min(1024, max(16, triton.next_power_of_2(h)))
    scales = integer or IntegerScales(partial, partial)
    extra = outliers or Outliers(partial, partial, partial)
    with device.on(partial.device):
        _finish[(rows, triton.cdiv(h, block))](
            partial, scales.scales, scales.zeros, scales.row_scale, scales.row_sum, offset, bias, expert, extra.x,
            extra.columns, extra.weights, residual, y, splits, partial.stride(0), width, n, extra.x.shape[-1], h,
            extra.columns.numel() if outliers else 0, INTEGER=integer is not None,
            ZERO=scales.zeros is not None, OFFSET=offset is not None, BIAS=bias is not None, EXPERT=expert is not None,
            MIXED=outliers is not None, GATE=int(gate), RESIDUAL=residual is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y
