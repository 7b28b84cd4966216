"""`embedding_vq` on a GPU: rows of a packed vector-quantized matrix, decoded to float32."""

from __future__ import annotations

import torch

from qcompiler.errors import UnsupportedError
from qcompiler.gpu import device, dispatch, vq_launch
from qcompiler.gpu.embedding_nbit import check_indices
from qcompiler.gpu.vq_launch import Weight
from qcompiler.ops.formats import VqFormat


def embedding_vq(
    indices, codes, codebooks, codebook_scales, scales, dim, centroids, block_rows, block_columns, group, n, k, layout_version
):
    """The CUDA implementation of the op: W[indices], float32 `[..., k]`, bit-equal to the reference.

    Negative indices count from the end.

    Raises:
        InputError, RuntimeError: as `check_indices`.
        UnsupportedError: a device that the kernels do not take, a rule that names a kernel that is none of this op.
        InputError: no rule of the dispatch table fits.
    """
    device.require(indices.device, "embedding_vq", torch.float32)
    format = VqFormat(dim, centroids, block_rows, block_columns, group)
    weight = Weight(codes, codebooks, codebook_scales, scales, format, n, k).checked("embedding_vq", indices.device)
    check_indices("embedding_vq", indices, n)
    flat = indices.reshape(-1).contiguous()
    if not flat.numel():
        return torch.empty((*indices.shape, k), device=indices.device)
    choice = dispatch.choose(
        "embedding_vq", format=format.label, activation="float", dtype="float32", rows=flat.numel(), outputs=n, inputs=k,
        device=device.name(indices.device),
    )  # fmt: skip
    if choice.kernel != "rows":
        raise UnsupportedError(
            f"embedding_vq: {choice.place} names kernel {choice.kernel!r}, which does not decode rows; there is rows"
        )
    y = vq_launch.embed(flat, weight, columns=choice.config["block_k"], warps=choice.config["warps"])
    return y.view(*indices.shape, k)
