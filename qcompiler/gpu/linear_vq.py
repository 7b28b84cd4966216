"""`linear_vq` on a GPU: which kernel a call takes, the activations before it and the edges after it.

    gemv, gemv_gather     a row or few, without tensor cores; the second looks entries up by `tl.gather`
    dot, dot_gather       rows in tiles of `block_m`, on tensor cores, entries as they are
    dot_narrow            the same, looking up int8 for 16-bit activations too: half the memory, some more instructions
    matmul                W in the dtype of x, made anew in every call, `chunk` bytes of it at a time, then torch.matmul

The last one multiplies with a·sa in the dtype of x where activations are int8; the others take a as integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from qcompiler.errors import UnsupportedError
from qcompiler.gpu import activations, device, dispatch, edges, vq_launch
from qcompiler.gpu.vq_launch import Weight
from qcompiler.ops.formats import ACTIVATION_BLOCK, Activation, VqFormat

GEMV_ROWS = 4  # rows that one look-up serves
CHUNK_ROWS = 64  # a part of a dequantized weight is a multiple of this


def linear_vq(
    x, codes, codebooks, codebook_scales, scales, bias, residual, norm, dim, centroids, block_rows, block_columns, group, n,
    k, activation, layout_version, gate, epsilon,
):  # fmt: skip
    """The CUDA implementation of the op: y in the dtype of x, float32, float16 or bfloat16 `[..., n]` (half with a gate).

    Raises:
        UnsupportedError: a device or dtype that the kernels do not take, a rule that names a kernel that is none of this op.
        InputError: no rule of the dispatch table fits.
    """
    device.require(x.device, "linear_vq", x.dtype)
    weight = Weight(
        codes, codebooks, codebook_scales, scales, VqFormat(dim, centroids, block_rows, block_columns, group), n, k
    ).checked("linear_vq", x.device)
    torch._check(x.shape[-1] == k, lambda: f"linear_vq: x has {x.shape[-1]} columns, the weight {k}")
    rows = x.reshape(-1, k).contiguous()
    columns = n // 2 if gate else n
    if not len(rows):
        return x.new_empty((*x.shape[:-1], columns))
    with device.on(x.device):
        partials = product(rows, weight, Activation(activation), norm, epsilon)
        if residual is not None:
            residual = residual.reshape(-1, columns).contiguous()
        y = edges.finish(partials, n, x.dtype, bias=bias, residual=residual, gate=gate)
    return y.view(*x.shape[:-1], columns)


def product(
    x: torch.Tensor, weight: Weight, activation: Activation, norm: torch.Tensor | None = None, epsilon: float = 0.0
) -> torch.Tensor:
    """Partial sums `[splits, rows, n]` of x `[rows, k]`, at least one row, contiguous, with the kernel of the dispatch table."""
    rows, k = x.shape
    choice = dispatch.choose(
        "linear_vq", format=weight.format.label, activation=activation.label, dtype=str(x.dtype).removeprefix("torch."),
        rows=rows, outputs=weight.n, inputs=k, device=device.name(x.device),
    )  # fmt: skip
    if choice.kernel not in KERNELS:
        raise UnsupportedError(
            f"linear_vq: {choice.place} names kernel {choice.kernel!r}, which does not compute {weight.format.label}; there are "
            f"{', '.join(KERNELS)}"
        )
    a, sa = x, None
    if activation is not Activation.FLOAT:
        a, sa = activations.quantize(x, Activation.INT8_BLOCK, norm=norm, epsilon=epsilon)
    elif norm is not None or choice.kernel == "matmul":
        a = activations.prepared(x, norm, epsilon)
    return KERNELS[choice.kernel](a, sa, weight, x.dtype, choice.config)


def _gemv(gather: bool):
    def run(a, sa, weight: Weight, dtype: torch.dtype, config: Mapping[str, int]) -> torch.Tensor:
        rows = min(GEMV_ROWS, triton.next_power_of_2(len(a)))
        columns = min(config["block_k"], ACTIVATION_BLOCK) if gather else config["block_k"]
        programs = triton.cdiv(weight.n, config["block_n"]) * triton.cdiv(len(a), rows)
        split = dispatch.splits(config["split"], programs, triton.cdiv(weight.k, columns), device.processors(a.device))
        return vq_launch.gemv(
            a, sa, weight, rows=rows, columns=columns, block_n=config["block_n"], split=split, gather=gather,
            warps=config["warps"], stages=config["stages"],
        )  # fmt: skip

    return run


def _dot(gather: bool, narrow: bool = False):
    def run(a, sa, weight: Weight, dtype: torch.dtype, config: Mapping[str, int]) -> torch.Tensor:
        programs = triton.cdiv(weight.n, config["block_n"]) * triton.cdiv(len(a), config["block_m"])
        steps = triton.cdiv(weight.k, weight.segment)  # a step is a segment of the format, whatever block_k says
        split = dispatch.splits(config["split"], programs, steps, device.processors(a.device))
        return vq_launch.dot(
            a, sa, weight, rows=config["block_m"], block_n=config["block_n"], split=split, gather=gather, narrow=narrow,
            warps=config["warps"], stages=config["stages"],
        )  # fmt: skip

    return run


def _matmul(a, sa, weight: Weight, dtype: torch.dtype, config: Mapping[str, int]) -> torch.Tensor:
    n, k = weight.n, weight.k
    if sa is not None:
        a = (a.to(torch.float32) * sa.repeat_interleave(ACTIVATION_BLOCK, 1)[:, :k]).to(dtype)
    chunk = config["chunk"] // (k * dtype.itemsize * CHUNK_ROWS) * CHUNK_ROWS if config["chunk"] else n
    chunk = min(max(chunk, CHUNK_ROWS), n)
    if chunk == n:
        return torch.matmul(a, vq_launch.dequantize(weight, dtype).t())[None]
    y = a.new_empty((1, len(a), n))
    for start in range(0, n, chunk):
        part = vq_launch.dequantize(weight, dtype, first=start, count=min(chunk, n - start))
        torch.mm(a, part.t(), out=y[0, :, start : start + chunk])
    return y


KERNELS = {
    "gemv": _gemv(False), "gemv_gather": _gemv(True), "dot": _dot(False), "dot_gather": _dot(True),
    "dot_narrow": _dot(False, narrow=True), "matmul": _matmul,
}  # fmt: skip
