"""Modules in memory that compute in another type than float32: what is compiled computes in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map_only

from qcompiler.capture.stored import StoredWeights


def in_float32(module: Module, example: Any) -> tuple[Module, Any, StoredWeights, list[str]]:
    """The module with float32 in the place of every other floating type, beside the caller's, which stays as it is.

    Half-precision parameters are shared and become stand-ins (`StoredWeights`); wider and narrower ones are converted.

    Args:
        module: as the caller gave it.
        example: what it is called with; its floating tensors are converted with the module.

    Returns:
        module, example, the parameters behind stand-ins, and notes; the caller's own and nothing where all is float32.
    """
    tensors = [*module.parameters(), *module.buffers()]
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if _other(t)})
    if not kinds:
        return module, example, StoredWeights(), []
    # A copy of the modules alone: the tensors are the caller's.
    widened: Module = copy.deepcopy(module, {id(t): t for t in tensors})
    made: dict[int, Parameter] = {}
    for owner in widened.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and _other(buffer):
                owner._buffers[name] = buffer.float()
        for name, parameter in owner._parameters.items():
            if parameter is not None and _other(parameter) and parameter.dtype not in (torch.float16, torch.bfloat16):
                made.setdefault(id(parameter), Parameter(parameter.detach().float(), requires_grad=False))
                owner._parameters[name] = made[id(parameter)]
        config: Any = getattr(owner, "config", None)
        if isinstance(getattr(config, "dtype", None), torch.dtype):
            config.dtype = torch.float32
    inputs = tree_map_only(torch.Tensor, lambda t: t.float() if _other(t) else t, example)
    note = f"the module has {' and '.join(kinds)} tensors; what is compiled computes in float32, inputs and outputs included"
    return widened, inputs, StoredWeights.stand_in(widened), [note]


def _other(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float32
