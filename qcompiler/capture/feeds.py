"""Arguments for a captured graph from tokens, for any model: what each argument is follows from its name and axes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree
from transformers.exporters.exporter_dynamo import is_cache_object

from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError

TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"


def takes_tokens(prepared: Prepared) -> bool:
    """Whether the graph reads token ids."""
    return TOKENS in prepared.inputs


def arguments(prepared: Prepared) -> dict[str, Any]:
    """A fresh copy of the inputs that the graph takes; flags such as `use_cache` were fixed when it was captured."""
    return {name: value for name, value in prepared.example().items() if name in prepared.dynamic_shapes}


def feed(prepared: Prepared, tokens: torch.Tensor, past: int = 0, cache: Any = None) -> dict[str, Any]:
    """Keyword arguments that run `tokens` through the captured graph, by default from the beginning, the cache empty.

    Args:
        prepared: the model as prepared; decides the arguments.
        tokens: int64 `[batch, length]`.
        past: how many tokens were run before.
        cache: what came out with the last of them, for a decoder.

    Raises:
        UnsupportedError: the model takes no tokens, or fewer of them at once.

    An encoder-decoder gets the same text on both sides: the decoder's begins with its start token and ends a token earlier.
    """
    if not takes_tokens(prepared):
        raise UnsupportedError(f"{prepared.description}: takes no token ids; give example inputs instead")
    batch, length = tokens.shape
    if prepared.step is not None and length > prepared.step:
        raise UnsupportedError(
            f"{prepared.description}: its graph takes {prepared.step} tokens at once, found {length}: run them in steps"
        )
    if length < prepared.shortest:
        raise UnsupportedError(
            f"{prepared.description}: its graph takes texts of {prepared.shortest} tokens and more, found {length}"
        )
    if prepared.fixed is not None and length > prepared.fixed.tokens:
        raise UnsupportedError(
            f"{prepared.description}: its graph takes texts of {prepared.fixed.tokens} tokens alone, found {length}"
        )
    sizes = {"batch": batch, "length": length, "past_length": past, "total_length": past + length, "decoder_length": length}
    kept = cache_name(prepared) if cache is not None else None
    return {
        name: cache if name == kept else _argument(name, value, prepared.axes, sizes, tokens)
        for name, value in (arguments(prepared) | _shifted(prepared, tokens)).items()
    }


def steps(prepared: Prepared, tokens: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Arguments that run `tokens` `[1, length]` in steps as long as the graph takes them: one, where it takes any number.

    The cache that goes into a later step is computed by the model itself.
    """
    length = tokens.shape[1]
    size = prepared.step or length
    cache = None
    for past in range(0, length, size):
        given = feed(prepared, tokens[:, past : past + size], past, cache)
        yield given
        if past + size < length:
            with torch.no_grad(), prepared.stored.lent(prepared.module):
                cache = prepared.module(**copy.deepcopy(given), **prepared.switches)[cache_name(prepared)]


def cache_name(prepared: Prepared) -> str:
    """The argument that holds a decoder's cache."""
    return next(name for name, value in prepared.inputs.items() if is_cache_object(value))


def _shifted(prepared: Prepared, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    if DECODER_TOKENS not in prepared.inputs:
        return {}
    start = torch.full_like(tokens[:, :1], prepared.start or 0)
    return {DECODER_TOKENS: torch.cat([start, tokens[:, :-1]], 1)}


def _argument(name: str, value: Any, axes: dict[str, dict[int, str]], sizes: dict[str, int], tokens: torch.Tensor) -> Any:
    if name == TOKENS:
        return tokens
    if name == DECODER_TOKENS:
        return value
    if isinstance(value, torch.Tensor):
        shape = [sizes.get(axes.get(name, {}).get(axis, ""), size) for axis, size in enumerate(value.shape)]
        if name in ("position_ids", "cache_position"):
            return torch.arange(sizes["past_length"], sizes["total_length"], dtype=value.dtype).expand(shape)
        return torch.ones(shape, dtype=value.dtype) if "mask" in name else torch.zeros(shape, dtype=value.dtype)
    if not is_cache_object(value):
        return value
    # Every tensor cut to nothing along the axis that grows; a state without one is zeros before any token.
    leaves, spec = _pytree.tree_flatten(value)
    paths = iter([path for path in axes if path.startswith(f"{name}.")])
    empty = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            path = next(paths)
            if not axes[path]:
                leaf = torch.zeros_like(leaf)
            for axis, meaning in axes[path].items():
                leaf = leaf.narrow(axis, 0, sizes["past_length"] if meaning == "past_length" else leaf.shape[axis])
        empty.append(leaf)
    return _pytree.tree_unflatten(empty, spec)
