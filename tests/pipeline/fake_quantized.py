"""A module with its weights and activations rounded in float arithmetic: what an artifact of it must compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_nbit import quantize_activations
from qcompiler.quantizer import Quantizer


def fake_quantized(module: torch.nn.Module, quantizer: Quantizer) -> torch.nn.Module:
    """A copy of `module` that rounds what `quantizer` solved; sites are found by the path of their module."""
    assert quantizer.context is not None
    module = copy.deepcopy(module).eval()
    for name, solution in quantizer.context.solutions.items():
        layer = module.get_submodule(name)
        layer.weight.data = solution.dequantize()
        if not isinstance(layer, torch.nn.Embedding):
            layer.register_forward_pre_hook(_rounding(quantizer.context.schemes[name].activation))
    return module


def _rounding(activation: Activation) -> Callable[..., tuple[torch.Tensor] | None]:
    def hook(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if activation is Activation.FLOAT:
            return None
        (x,) = arguments
        codes, scale = quantize_activations(x.reshape(-1, x.shape[-1]).detach().numpy(), activation)
        return (torch.from_numpy(codes * scale).reshape(x.shape),)

    return hook
