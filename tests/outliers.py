"""Plant channel outliers in a decoder without changing what it computes.

Every pair of constants that meet in a channel is scaled by a factor and its inverse, a power of two, so that the model's
float outputs stay the same. It works on the model's own modules and knows nothing of how the compiler finds such pairs.
"""

from __future__ import annotations

import torch
from torch import nn


def plant(model: nn.Module, factor: float = 64.0, features: int = 3, seed: int = 0) -> dict[str, list[int]]:
    """Multiply a few channels by `factor` before every attention, feed-forward block, output projection of both.

    Args:
        model: a decoder with the module names of Llama: `input_layernorm`, `post_attention_layernorm`, `self_attn.v_proj` …,
            heads may share values. Changed in place.
        factor: a power of two.
        features: channels at each place.
        seed: of their choice.

    Returns:
        Name of the module whose output was scaled -> its channels.
    """
    generator = torch.Generator().manual_seed(seed)
    planted: dict[str, list[int]] = {}
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            places = {
                "input_layernorm": (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                "post_attention_layernorm": (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
                "self_attn.v_proj": (attention.v_proj, [attention.o_proj]),
                "mlp.up_proj": (mlp.up_proj, [mlp.down_proj]),
            }
            for name, (source, readers) in places.items():
                channels = torch.randperm(source.weight.shape[0], generator=generator)[:features].sort().values
                source.weight[channels] *= factor
                if getattr(source, "bias", None) is not None:
                    source.bias[channels] *= factor
                columns = _columns(channels, attention) if name == "self_attn.v_proj" else channels
                for reader in readers:
                    reader.weight[:, columns] /= factor
                planted[f"model.layers.{index}.{name}"] = channels.tolist()
    return planted


def _columns(channels: torch.Tensor, attention: nn.Module) -> torch.Tensor:
    """Columns of the output projection that read these rows of the value projection: one for each head that shares them."""
    width = attention.head_dim
    repeats = attention.o_proj.weight.shape[1] // attention.v_proj.weight.shape[0]
    heads, inside = channels // width, channels % width
    return torch.cat([(heads * repeats + repeat) * width + inside for repeat in range(repeats)])
