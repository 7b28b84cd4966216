"""How often kernels are compiled while a model is served: `python -m tests.gpu.specializations`, where Triton does not interpret.

A kernel is compiled for its constants and types, and anew for an integer argument that is 1 or a multiple of 16, unless it is
declared that nothing but the argument's value is of use (`do_not_specialize`). What is compiled first when a request comes with
a new number of tokens makes that request wait.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from tests.gpu.dry_run import CUDA, dry

MODULES = (
    "activations", "dequantize", "dot", "edges", "embedding_nbit", "gemv", "linear_mixed", "vq_kernels",
)  # fmt: skip
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 3, 5, 7, 12, 16, 17, 23, 32, 33, 48, 57, 64, 77, 100, 128, 150, 200, 255, 256, 300, 400, 512, 999)


def launchers() -> dict[str, JITFunction]:
    """Name -> kernel that is launched with a declaration, of all modules."""
    found: dict[str, JITFunction] = {}
    for name in MODULES:
        values = vars(import_module(f"qcompiler.gpu.{name}")).items()
        found |= {f"{name}.{k}": v for k, v in values if isinstance(v, JITFunction) and v.do_not_specialize}
    return found


def compiled(kernels: dict[str, JITFunction]) -> dict[str, int]:
    """How many times each kernel is compiled for the layers of a model with int4 weights, over many lengths of prompts."""
    from qcompiler.gpu import implementation
    from qcompiler.ops import layout
    from qcompiler.ops.formats import AffineFormat

    by_name = {kernel.fn.__name__: kernel for kernel in kernels.values() if kernel.fn.__module__ != "qcompiler.gpu.vq_kernels"}
    seen: set[tuple[Any, ...]] = set()

    def launched(name: str, values: dict[str, Any]) -> None:
        plain = {p.name for p in by_name[name].params if p.do_not_specialize}
        constants = {p.name for p in by_name[name].params if p.is_constexpr}
        constants |= {"num_warps", "num_stages"}
        seen.add((name, *(v if key in constants else _kind(v, key in plain) for key, v in values.items())))

    format, empty = AffineFormat(4, 128), lambda shape, dtype: torch.empty(shape, dtype=dtype, device=CUDA)
    with pytest.MonkeyPatch.context() as patch, dry(patch, launched):
        for n, k in LAYERS:
            for rows in ROWS:
                codes = empty(layout.codes_shape(n, k, 4), torch.uint8)
                scales = empty(layout.scales_shape(n, k, format), torch.float16)
                x = empty((rows, k), torch.float16)
                implementation("linear_nbit")(x, codes, scales, *[None] * 7, 4, 128, n, k, 0, 1, 0, 0.0)
    return dict(Counter(name for name, *_ in seen))


def _kind(value: Any, plain: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool) and not plain:
        return "1" if value == 1 else "16" if value % 16 == 0 else "other"
    return type(value).__name__


if __name__ == "__main__":
    kernels = launchers()
    unknown = {name: sorted(set(k.do_not_specialize) - set(k.arg_names)) for name, k in kernels.items()}
    print(json.dumps({"unknown": unknown, "compiled": compiled(kernels)}))
