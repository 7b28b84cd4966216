"""Arguments for a captured graph from tokens, for any model: what each argument is follows from its name and axes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError

TOKENS = "input_ids"


def takes_tokens(prepared: Prepared) -> bool:
    """Whether the graph reads token ids."""
    return TOKENS in prepared.inputs


def arguments(prepared: Prepared) -> dict[str, Any]:
    """A fresh copy of the inputs that the graph takes; flags such as `use_cache` were fixed when it was captured."""
    return {name: value for name, value in prepared.example().items() if name in prepared.dynamic_shapes}


def feed(prepared: Prepared, tokens: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments that run `tokens` through the captured graph from the beginning, the cache empty.

    Args:
        prepared: the model as prepared; decides the arguments.
        tokens: int64 `[batch, length]`.

    Raises:
        UnsupportedError: the model takes no tokens.
    """
    if not takes_tokens(prepared):
        raise UnsupportedError(f"{prepared.description}: takes no token ids; give example inputs instead")
    batch, length = tokens.shape
    example = arguments(prepared)
    sizes = {"batch": batch, "length": length, "past_length": 0, "total_length": length}
    return {name: _argument(name, value, prepared.axes, sizes, tokens) for name, value in example.items()}


def _argument(name: str, value: Any, axes: dict[str, dict[int, str]], sizes: dict[str, int], tokens: torch.Tensor) -> Any:
    if name == TOKENS:
        return tokens
    if isinstance(value, torch.Tensor):
        shape = [sizes.get(axes.get(name, {}).get(axis, ""), size) for axis, size in enumerate(value.shape)]
        if name in ("position_ids", "cache_position"):
            return torch.arange(sizes["length"], dtype=value.dtype).expand(shape)
        return torch.ones(shape, dtype=value.dtype) if "mask" in name else torch.zeros(shape, dtype=value.dtype)
    leaves, spec = _pytree.tree_flatten(value)
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return value
    # A cache: every tensor cut to nothing along the axis that grows.
    paths = [path for path in axes if path.startswith(f"{name}.")]
    tensors = iter(paths)
    empty = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            for axis, meaning in axes[next(tensors)].items():
                leaf = leaf.narrow(axis, 0, sizes.get(meaning, leaf.shape[axis]))
        empty.append(leaf)
    return _pytree.tree_unflatten(empty, spec)
