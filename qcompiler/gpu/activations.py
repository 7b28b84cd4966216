"""What happens to x before a product: RMSNorm, int8 quantization, and NaN for a row that is not finite (docs/layout.md).

One program a row, which stays in the cache between its passes:

    sums of squares -> r        where there is a norm, in float64
    greatest |x| -> scale       int8 per token
    x -> a                      int8, or x itself in its own dtype

`a` has the bits that the CPU kernels give: divisions are rounded correctly, and halves go to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.gpu import device
from qcompiler.ops.formats import ACTIVATION_BLOCK, Activation

# 1.5 · 2^23: adding it to |v| < 2^22 and subtracting it again rounds v to the nearest integer, halves to even, on every device.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)
FLOAT = tl.constexpr(int(Activation.FLOAT))
TOKEN = tl.constexpr(int(Activation.INT8_TOKEN))
BLOCKS = tl.constexpr(int(Activation.INT8_BLOCK))
STATIC = tl.constexpr(int(Activation.INT8_STATIC))
WIDTH = tl.constexpr(ACTIVATION_BLOCK)


@triton.jit
def finite_or_nan(x):
    """x where it is finite, NaN where it is not."""
    return x + (x - x)


@triton.jit
def round_half_even(x):
    """The nearest integer of |x| < 2^22, as float32."""
    return (x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@triton.jit
def _load(x_ptr, norm_ptr, columns, k, r, NORM: tl.constexpr):
    x = tl.load(x_ptr + columns, mask=columns < k, other=0.0).to(tl.float32)
    if NORM:
        x = (x * r) * tl.load(norm_ptr + columns, mask=columns < k, other=0.0).to(tl.float32)
    return x


@triton.jit
def _levels(x, scale):
    """round(x / scale) within ±1000, 0 where the scale is 0 or the quotient NaN."""
    q = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    q = tl.minimum(tl.maximum(q, -1000.0), 1000.0)
    return tl.where(q == q, round_half_even(q), 0.0)


@triton.jit(do_not_specialize=("blocks",))
def _prepare(
    x_ptr, norm_ptr, range_scale_ptr, range_zero_ptr, a_ptr, scale_ptr, k, stride, blocks, epsilon,
    NORM: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * k
    a_ptr += row * stride
    lanes = tl.arange(0, CHUNK)
    r = 1.0
    if NORM:
        squares = tl.zeros([CHUNK], tl.float64)
        for start in range(0, k, CHUNK):
            wide = tl.load(x_ptr + start + lanes, mask=start + lanes < k, other=0.0).to(tl.float64)
            squares += wide * wide
        r = (1.0 / tl.sqrt(tl.sum(squares, 0) / k + epsilon)).to(tl.float32)
    if KIND == TOKEN or KIND == STATIC:
        largest = tl.zeros([CHUNK], tl.float32)
        broken = tl.zeros([CHUNK], tl.float32)  # 0, NaN where something is not finite
        for start in range(0, k, CHUNK):
            x = _load(x_ptr, norm_ptr, start + lanes, k, r, NORM)
            largest = tl.maximum(largest, tl.abs(x))
            broken += x - x
        if KIND == TOKEN:
            scale = tl.div_rn(tl.max(largest, 0), 127.0)
        else:
            scale = tl.load(range_scale_ptr)
        tl.store(scale_ptr + row, scale + tl.sum(broken, 0))
    for start in range(0, stride, CHUNK):
        columns = start + lanes
        x = _load(x_ptr, norm_ptr, columns, k, r, NORM)
        if KIND == FLOAT:
            tl.store(a_ptr + columns, finite_or_nan(x).to(a_ptr.dtype.element_ty), mask=columns < stride)
        else:
            low = -127.0
            zero = 0.0
            if KIND == BLOCKS:
                pairs = tl.reshape(x, [CHUNK // WIDTH, WIDTH])
                peak = tl.max(tl.abs(pairs), 1)
                block_scale = tl.div_rn(peak, 127.0)
                q = tl.reshape(_levels(pairs, block_scale[:, None]), [CHUNK])
                block = start // WIDTH + tl.arange(0, CHUNK // WIDTH)
                tl.store(scale_ptr + row * blocks + block, block_scale + tl.sum(pairs - pairs, 1), mask=block < blocks)
            else:
                q = _levels(x, scale)
            if ZERO:
                low = -128.0
                zero = tl.load(range_zero_ptr).to(tl.float32)
            q = tl.minimum(tl.maximum(q + zero, low), 127.0)
            tl.store(a_ptr + columns, tl.where(columns < k, q, 0.0).to(tl.int8), mask=columns < stride)


def _run(x, norm, epsilon, kind, range_scale, range_zero, stride) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, k = x.shape
    blocks = -(-k // ACTIVATION_BLOCK) if kind is Activation.INT8_BLOCK else 1
    a = x.new_empty((rows, stride), dtype=x.dtype if kind is Activation.FLOAT else torch.int8)
    scale = None if kind is Activation.FLOAT else x.new_empty((rows, blocks), dtype=torch.float32)
    if rows:
        chunk = min(2048, max(256, triton.next_power_of_2(stride)))
        with device.on(x.device):
            _prepare[(rows,)](
                x, norm if norm is not None else x, range_scale, range_zero, a, scale, k, stride, blocks, float(epsilon),
                NORM=norm is not None, KIND=int(kind), ZERO=range_zero is not None, CHUNK=chunk, num_warps=4,
            )  # fmt: skip
    return a, scale


def quantize(
    x: torch.Tensor,
    activation: Activation,
    *,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    range_scale: torch.Tensor | None = None,
    range_zero: torch.Tensor | None = None,
    multiple: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 activations of x, or of RMSNorm(x).

    Args:
        x: float32, float16 or bfloat16 `[rows, k]`, contiguous.
        activation: one of the int8 kinds.
        norm, epsilon: float32 `[k]` and the epsilon of an RMSNorm before.
        range_scale, range_zero: S_a float32 `[1]` and Z_a int8 `[1]` (None: symmetric) of `INT8_STATIC`.
        multiple: the columns of `a` are filled up with zeros to a multiple of this.

    Returns:
        a int8 `[rows, columns]`; scale float32 `[rows, blocks]`, one block for each 128 inputs or one for the row, NaN where
        the block has an input that is not finite.
    """
    assert activation is not Activation.FLOAT
    stride = -(-x.shape[1] // multiple) * multiple
    a, scale = _run(x, norm, epsilon, activation, range_scale, range_zero, stride)
    assert scale is not None
    return a, scale


def prepared(x: torch.Tensor, norm: torch.Tensor | None = None, epsilon: float = 0.0) -> torch.Tensor:
    """x, or RMSNorm(x) rounded to the dtype of x, with NaN for what is not finite: `[rows, k]`."""
    return _run(x, norm, epsilon, Activation.FLOAT, None, None, x.shape[1])[0]
