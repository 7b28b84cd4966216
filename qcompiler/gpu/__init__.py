"""The ops on a GPU: Triton kernels that read the packed bytes as they lie in an artifact (docs/gpu.md).

Imported on the first call of an op with CUDA tensors. Importing it needs Triton and asks no device.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from qcompiler.gpu import device

device.require_triton()

# Op -> module whose function of the op's name takes the arguments of the torch op.
MODULES = {
    "linear_nbit": "linear_nbit",
    "linear_mixed": "linear_mixed",
    "linear_experts_nbit": "experts",
    "embedding_nbit": "embedding_nbit",
    "linear_vq": "linear_vq",
    "embedding_vq": "embedding_vq",
}


def implementation(op: str) -> Callable[..., Any]:
    """The CUDA implementation of an op of `qcompiler.ops.SPECS`."""
    return getattr(import_module(f"qcompiler.gpu.{MODULES[op]}"), op)
