"""`linear_nbit` on a GPU: what the dispatch table says, between the edges."""

from __future__ import annotations

import torch

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import activations, device, dispatch, edges
from qcompiler.gpu.dequantize import INT_MM_COLUMNS, int_mm, int_mm_takes, matmul
from qcompiler.gpu.dot import blocks_of_rows, dot
from qcompiler.gpu.gemv import gemv
from qcompiler.gpu.weight import Weight, expect, packed
from qcompiler.ops import linear_edges
from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_edges import Gate


def dtype_label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_range(
    op: str, activation: Activation, scale: torch.Tensor | None, zero: torch.Tensor | None, offset: torch.Tensor | None, n: int,
    place: torch.device,
) -> None:  # fmt: skip
    """The three inputs of static activations, which are there for no others.

    Raises:
        InputError: one is missing, or has another shape, dtype or place.
    """
    expect(op, "activation_scale", scale, torch.float32, (1,), place)
    expect(op, "activation_zero", zero, torch.int8, (1,), place)
    expect(op, "activation_offset", offset, torch.float32, (n,), place)
    if (activation is Activation.INT8_STATIC) != (scale is not None):
        raise InputError(f"{op}: activation_scale is given for int8-static activations and for no others")
    if (zero is None) != (offset is None) or (zero is not None and scale is None):
        raise InputError(f"{op}: activation_zero and activation_offset are given together, with activation_scale, or not at all")


def check_sums(op: str, weight: Weight, activation: Activation, asymmetric: bool) -> None:
    """Whether the products of whole rows fit int32 (docs/layout.md).

    Raises:
        UnsupportedError: they may not.
    """
    if weight.format.group or activation in (Activation.FLOAT, Activation.INT8_BLOCK):
        return
    greatest = (1 << weight.format.bits) - 1 if weight.zeros is not None else weight.center
    limit = (2**31 - 1) // (greatest * (128 if asymmetric else 127))
    if weight.k > limit:
        raise UnsupportedError(
            f"{op}: rows of {weight.k} columns with one scale: {weight.format.label} and {activation.label} activations sum in "
            f"int32, which holds {limit}; use groups"
        )


def checked(
    op: str, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None,
    activation_scale: torch.Tensor | None, activation_zero: torch.Tensor | None, activation_offset: torch.Tensor | None,
    bits: int, group: int, n: int, k: int, kind: Activation,
) -> Weight:  # fmt: skip
    """The weight of a call, whose device and tensors are what the kernels take.

    Raises:
        InputError: tensors that do not fit the attributes.
        UnsupportedError: a device or dtype that the kernels do not take, or sums that int32 may not hold.
    """
    device.require(x.device, op, x.dtype)
    if x.shape[-1] != k:
        raise InputError(f"{op}: x has {x.shape[-1]} columns, the weight {k}")
    weight = packed(op, codes, scales, zeros, bits, group, n, k, x.device)
    check_range(op, kind, activation_scale, activation_zero, activation_offset, n, x.device)
    check_sums(op, weight, kind, activation_zero is not None)
    expect(op, "bias", bias, torch.float32, (n,), x.device)
    return weight


def product(
    op: str, x: torch.Tensor, weight: Weight, activation: Activation, *, norm: torch.Tensor | None = None, epsilon: float = 0.0,
    range_scale: torch.Tensor | None = None, range_zero: torch.Tensor | None = None, expert: torch.Tensor | None = None,
) -> tuple[torch.Tensor, edges.IntegerScales | None]:  # fmt: skip
    """Partial sums of x `[rows, k]` times the weight, for `edges.finish`: `[splits, rows, width]`, and what scales integers.

    With `expert`, int64 `[rows]`, a row meets one of the weight's matrices.

    Raises:
        UnsupportedError: the table names a kernel that does not compute this.
    """
    choice = dispatch.choose(
        op, format=weight.format.label, activation=activation.label, dtype=dtype_label(x.dtype), rows=x.shape[0],
        outputs=weight.n, inputs=weight.k, device=device.name(x.device),
    )  # fmt: skip
    if activation is Activation.FLOAT:
        if norm is not None or choice.kernel == "matmul":
            x = activations.prepared(x, norm, epsilon)
        if choice.kernel == "matmul" and expert is None:
            return matmul(x, weight, choice.config), None
        a, sa = x, None
    else:
        a, sa = activations.quantize(
            x, activation, norm=norm, epsilon=epsilon, range_scale=range_scale, range_zero=range_zero,
            multiple=INT_MM_COLUMNS if choice.kernel == "int_mm" else 1,
        )  # fmt: skip
        if choice.kernel == "int_mm" and expert is None and int_mm_takes(x.shape[0], weight, sa.shape[1]):
            sums = None if weight.zeros is None else a.sum(1, dtype=torch.int32)
            zeros = None if weight.zeros is None else weight.zeros.view(torch.int8)
            return int_mm(a, weight, choice.config), edges.IntegerScales(weight.scales, sa, zeros, sums)
    if choice.kernel == "gemv":
        return gemv(a, sa, weight, choice.config, expert), None
    if choice.kernel == "dot":
        blocks = None if expert is None else blocks_of_rows(expert, weight.experts, choice.config["block_m"])
        return dot(a, sa, weight, choice.config, blocks), None
    raise UnsupportedError(
        f"{op}: {choice.place} names kernel {choice.kernel!r}, which does not compute {weight.format.label} with "
        f"{activation.label} activations and {x.shape[0]} rows"
    )


def linear_nbit(
    x, codes, scales, zeros, bias, activation_scale, activation_zero, activation_offset, residual, norm, bits, group, n, k,
    activation, layout_version, gate, epsilon,
):  # fmt: skip
    """CUDA implementation of `qcompiler::linear_nbit`: x float32, float16 or bfloat16 `[..., k]`, y of its dtype.

    Raises:
        InputError: tensors that do not fit the attributes.
        UnsupportedError: a device or dtype that the kernels do not take.
    """
    op, kind, place = "linear_nbit", Activation(activation), x.device
    weight = checked(
        op, x, codes, scales, zeros, bias, activation_scale, activation_zero, activation_offset, bits, group, n, k, kind
    )
    present = [name for name, tensor in (("norm", norm), ("residual", residual)) if tensor is not None]
    linear_edges.check({"n": n, "gate": gate, "epsilon": epsilon}, present)
    shape = (*x.shape[:-1], linear_edges.output_columns({"n": n, "gate": gate}))
    expect(op, "norm", norm, torch.float32, (k,), place)
    expect(op, "residual", residual, (torch.float32, x.dtype), shape, place)
    rows = x.reshape(-1, k).contiguous()
    if not rows.shape[0]:
        return x.new_empty(shape)
    partial, integer = product(
        op, rows, weight, kind, norm=norm, epsilon=epsilon, range_scale=activation_scale, range_zero=activation_zero
    )
    y = edges.finish(
        partial, n, x.dtype, bias=bias, residual=None if residual is None else residual.contiguous(), gate=Gate(gate),
        offset=activation_offset, integer=integer,
    )  # fmt: skip
    return y.reshape(shape)
