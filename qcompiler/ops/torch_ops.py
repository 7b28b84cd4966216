"""The torch face of every declared op: schema, CPU kernel, GPU kernel, fake implementation, as one opaque op each."""

from __future__ import annotations

import torch

from qcompiler.ops import (
    SPECS,
    attention,  # noqa: F401  as the next
    experts_linear,  # noqa: F401  a program that was saved with it needs it to be known
    layout,
    linear_edges,
    vq_layout,
)
from qcompiler.ops.formats import VqFormat
from qcompiler.ops.spec import OpSpec

NAMESPACE = "qcompiler"
_library = torch.library.Library(NAMESPACE, "DEF")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check_x(op, x, k) -> None:
    torch._check(x.dtype == torch.float32, lambda: f"{op}: x is {x.dtype}, expected float32 on the CPU")
    torch._check(x.shape[-1] == k, lambda: f"{op}: x has {x.shape[-1]} columns, the weight {k}")


def _range(op, scale, zero, offset, n):
    """Addresses of a static range, whose values the library reads without a look at their sizes."""
    from qcompiler.runtime import library

    for name, tensor, dtype, size in (
        ("activation_scale", scale, torch.float32, 1),
        ("activation_zero", zero, torch.int8, 1),
        ("activation_offset", offset, torch.float32, n),
    ):
        torch._check(
            tensor is None or (tensor.dtype == dtype and tensor.shape == (size,)),
            lambda name=name, t=tensor, d=dtype, s=size: f"{op}: {name} is {t.dtype} {list(t.shape)}, expected {d} [{s}]",
        )
    if scale is None:
        torch._check(zero is None and offset is None, lambda: f"{op}: activation_scale is missing")
        return None
    return library.StaticRange(scale.data_ptr(), _address(zero), _address(offset))


def _with_edges(op, x, n, k, residual, norm, gate, epsilon):
    """The edges for the library, an empty y, and the contiguous tensors whose addresses the edges hold."""
    from qcompiler.runtime import library

    y = x.new_empty((*x.shape[:-1], linear_edges.output_columns({"n": n, "gate": gate})))
    for name, tensor, shape in (("residual", residual, y.shape), ("norm", norm, (k,))):
        torch._check(
            tensor is None or (tensor.dtype == torch.float32 and tensor.shape == shape),
            lambda name=name, t=tensor, s=shape: f"{op}: {name} is {t.dtype} {list(t.shape)}, expected torch.float32 {list(s)}",
        )
    held = [None if tensor is None else tensor.contiguous() for tensor in (residual, norm)]
    return library.Edges(_address(held[1]), epsilon, _address(held[0]), gate), y, held


def linear_nbit(
    x, codes, scales, zeros, bias, activation_scale, activation_zero, activation_offset, residual, norm, bits, group, n, k,
    activation, layout_version, gate, epsilon,
):  # fmt: skip
    """CPU kernel of `linear_nbit`: the C++ library, on torch's tensors in place.

    Raises:
        RuntimeError: from the library, when sizes do not fit.
    """
    from qcompiler.runtime import library

    _check_x("linear_nbit", x, k)
    static = _range("linear_nbit", activation_scale, activation_zero, activation_offset, n)
    x = x.contiguous()
    edges, y, held = _with_edges("linear_nbit", x, n, k, residual, norm, gate, epsilon)
    if y.numel():
        library.linear_nbit_pointers(
            x.data_ptr(), codes.data_ptr(), scales.data_ptr(), _address(zeros), _address(bias), y.data_ptr(),
            rows=y.numel() // y.shape[-1], bits=bits, group=group, n=n, k=k, activation=activation,
            activation_range=static, edges=edges, threads=torch.get_num_threads(),
        )  # fmt: skip
    del held  # until here its addresses were in use
    return y


def linear_mixed(
    x, codes, scales, zeros, columns, outliers, bias, activation_scale, activation_zero, activation_offset, bits, group, n,
    k, activation, layout_version,
):  # fmt: skip
    """CPU kernel of `linear_mixed`.

    Raises:
        RuntimeError: from the library: sizes that do not fit, columns outside `[0, k)` or not ascending.
    """
    from qcompiler.runtime import library

    _check_x("linear_mixed", x, k)
    static = _range("linear_mixed", activation_scale, activation_zero, activation_offset, n)
    shape = layout.outliers_shape(n, columns.numel())
    torch._check(
        columns.dtype == torch.int32 and columns.dim() == 1 and outliers.dtype == torch.float16 and outliers.shape == shape,
        lambda: f"linear_mixed: columns are {columns.dtype} {list(columns.shape)} and outliers {outliers.dtype} "
        f"{list(outliers.shape)}, expected torch.int32 [columns] and torch.float16 {list(shape)}",
    )
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel():
        library.linear_mixed_pointers(
            x.data_ptr(), codes.data_ptr(), scales.data_ptr(), _address(zeros), columns.data_ptr(), outliers.data_ptr(),
            _address(bias), y.data_ptr(), count=columns.numel(), rows=y.numel() // n, bits=bits, group=group, n=n, k=k,
            activation=activation, activation_range=static, threads=torch.get_num_threads(),
        )  # fmt: skip
    return y


def embedding_nbit(indices, codes, scales, zeros, bits, group, n, k, layout_version):
    """CPU kernel of `embedding_nbit`; negative indices count from the end."""
    from qcompiler.runtime import library

    indices = torch.where(indices < 0, indices + n, indices).contiguous()
    y = torch.empty((*indices.shape, k))
    if y.numel():
        library.embedding_nbit_pointers(
            indices.data_ptr(), codes.data_ptr(), scales.data_ptr(), _address(zeros), y.data_ptr(),
            count=indices.numel(), bits=bits, group=group, n=n, k=k, threads=torch.get_num_threads(),
        )  # fmt: skip
    return y


def linear_experts_nbit(
    x, expert, codes, scales, zeros, bias, bits, group, experts, n, k, activation, layout_version
):
    """CPU kernel of `linear_experts_nbit`.

    Raises:
        RuntimeError: from the library: sizes that do not fit, an expert index outside `[0, experts)`.
    """
    from qcompiler.runtime import library

    torch._check(x.dtype == torch.float32, lambda: f"linear_experts_nbit: x is {x.dtype}, expected float32 on the CPU")
    torch._check(
        x.dim() == 2 and x.shape[1] == k and expert.shape == x.shape[:1] and expert.dtype == torch.int64,
        lambda: f"linear_experts_nbit: x is {list(x.shape)} and expert {expert.dtype} {list(expert.shape)}, expected "
        f"[rows, {k}] and int64 [rows]",
    )
    x, expert = x.contiguous(), expert.contiguous()
    y = x.new_empty((x.shape[0], n))
    if y.numel():
        library.linear_experts_nbit_pointers(
            x.data_ptr(), expert.data_ptr(), codes.data_ptr(), scales.data_ptr(), _address(zeros), _address(bias),
            y.data_ptr(), rows=x.shape[0], bits=bits, group=group, experts=experts, n=n, k=k, activation=activation,
            threads=torch.get_num_threads(),
        )  # fmt: skip
    return y


def _check_vq(op, format, n, k, codes, codebooks, codebook_scales, scales) -> None:
    """Sizes of a vector-quantized weight, whose values the library reads without a look at them."""
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, vq_layout.codes_shape(n, k, format)),
        ("codebooks", codebooks, torch.int8, vq_layout.codebooks_shape(n, k, format)),
        ("codebook_scales", codebook_scales, torch.float16, format.blocks(n, k)),
        ("scales", scales, torch.float16, vq_layout.scales_shape(n, k, format)),
    ):
        torch._check(
            tensor.dtype == dtype and tensor.shape == shape,
            lambda name=name, t=tensor, d=dtype, s=shape: f"{op}: {name} are {t.dtype} {list(t.shape)}, expected {d} {list(s)}",
        )


def linear_vq(
    x, codes, codebooks, codebook_scales, scales, bias, residual, norm, dim, centroids, block_rows, block_columns, group, n,
    k, activation, layout_version, gate, epsilon,
):  # fmt: skip
    """CPU kernel of `linear_vq`.

    Raises:
        RuntimeError: from the library: sizes that do not fit, activations that the op does not take.
    """
    from qcompiler.runtime import library_vq

    _check_x("linear_vq", x, k)
    format = VqFormat(dim, centroids, block_rows, block_columns, group)
    _check_vq("linear_vq", format, n, k, codes, codebooks, codebook_scales, scales)
    x = x.contiguous()
    edges, y, held = _with_edges("linear_vq", x, n, k, residual, norm, gate, epsilon)
    if y.numel():
        library_vq.linear_vq_pointers(
            x.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), codebook_scales.data_ptr(), scales.data_ptr(),
            _address(bias), y.data_ptr(), rows=y.numel() // y.shape[-1], dim=dim, centroids=centroids,
            block_rows=block_rows, block_columns=block_columns, group=group, n=n, k=k, activation=activation, edges=edges,
            threads=torch.get_num_threads(),
        )  # fmt: skip
    del held  # until here its addresses were in use
    return y


def embedding_vq(
    indices, codes, codebooks, codebook_scales, scales, dim, centroids, block_rows, block_columns, group, n, k, layout_version
):
    """CPU kernel of `embedding_vq`; negative indices count from the end."""
    from qcompiler.runtime import library_vq

    format = VqFormat(dim, centroids, block_rows, block_columns, group)
    _check_vq("embedding_vq", format, n, k, codes, codebooks, codebook_scales, scales)
    indices = torch.where(indices < 0, indices + n, indices).contiguous()
    y = torch.empty((*indices.shape, k))
    if y.numel():
        library_vq.embedding_vq_pointers(
            indices.data_ptr(), codes.data_ptr(), codebooks.data_ptr(), codebook_scales.data_ptr(), scales.data_ptr(),
            y.data_ptr(), count=indices.numel(), dim=dim, centroids=centroids, block_rows=block_rows,
            block_columns=block_columns, group=group, n=n, k=k, threads=torch.get_num_threads(),
        )  # fmt: skip
    return y


_CPU = {
    "linear_nbit": linear_nbit,
    "linear_mixed": linear_mixed,
    "linear_experts_nbit": linear_experts_nbit,
    "embedding_nbit": embedding_nbit,
    "linear_vq": linear_vq,
    "embedding_vq": embedding_vq,
}


def _cuda(name: str):
    """GPU kernel of an op, in Triton (docs/gpu.md), which is imported when it is first called."""

    def call(*values):
        from qcompiler.gpu import implementation

        return implementation(name)(*values)

    return call


def _fake(spec: OpSpec):
    """Shapes from the declaration; a product has the dtype of x, a row of an embedding is float32."""

    def fake(*values):
        tensors, integers = values[: len(spec.inputs)], values[len(spec.inputs) :]
        shapes = {i.name: tuple(t.shape) for i, t in zip(spec.inputs, tensors, strict=True) if t is not None}
        shape = spec.output_shape(shapes, dict(zip(spec.attributes, integers, strict=True)))
        return tensors[0].new_empty(shape, dtype=torch.float32 if spec.inputs[0].name != "x" else tensors[0].dtype)

    return fake


def _register() -> None:
    for spec in SPECS.values():
        _library.define(spec.torch_schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(spec.name, _CPU[spec.name], "CPU")
        _library.impl(spec.name, _cuda(spec.name), "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{spec.name}", _fake(spec), lib=_library)


_register()


def overload(name: str) -> torch._ops.OpOverload:
    """The op to put into an FX graph: `torch.ops.qcompiler.<name>.default`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default
