"""Caches that hold more than growing keys and values: made fit for one graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from transformers.exporters.exporter_dynamo import is_cache_object
from transformers.exporters.utils import get_leaf_tensors

# Tokens in a step of a recurrence that works in chunks: one token costs as much as this many, beside the products.
STEP = 16
_GROWING = {
    DynamicSlidingWindowLayer: DynamicLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAttentionAndFullAttentionLayer,
}
# Set when the first keys come.
_SET_LATER = ("dtype", "device")


def grow_only(inputs: dict[str, Any]) -> None:
    """Let every layer of the caches among `inputs` keep all positions: the mask applies a sliding window.

    Nothing may have been dropped yet: the caches hold fewer positions than any window.
    """
    for value in inputs.values():
        for layer in getattr(value, "layers", ()) if is_cache_object(value) else ():
            if (kind := _GROWING.get(type(layer))) is not None:
                kept = {*vars(kind()), *_SET_LATER}
                layer.__class__ = kind
                layer.__dict__ = {name: found for name, found in vars(layer).items() if name in kept}


def on_copies(part: torch.nn.Module, inputs: dict[str, Any], states: set[str]) -> None:
    """Make `part`, a shallow copy of a model, work on copies of the `states` (paths) that it is given, in short chunks.

    Models write the next state into the tensor that held the last one; a graph whose inputs change under its caller
    could not be run twice with the same arguments. And they pad what they are given to whole chunks, hundreds of tokens
    for one: any length of a chunk gives the same numbers.
    """
    forward = part.forward
    places = {}
    for name, value in inputs.items():
        if is_cache_object(value):
            places[name] = [path in states for path in get_leaf_tensors({name: value})]
    if not any(any(copied) for copied in places.values()):
        return

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for name, copied in places.items():
            leaves, spec = _pytree.tree_flatten(kwargs[name])
            leaves = [leaf.clone() if copy else leaf for leaf, copy in zip(leaves, copied, strict=True)]
            kwargs[name] = _pytree.tree_unflatten(leaves, spec)
        with _short_chunks(part):
            return forward(*args, **kwargs)

    part.forward = wrapped


@contextlib.contextmanager
def _short_chunks(part: torch.nn.Module) -> Iterator[None]:
    sizes: list[tuple[Any, object]] = [(module, getattr(module, "chunk_size", None)) for module in part.modules()]
    changed = [(module, size) for module, size in sizes if isinstance(size, int)]
    try:
        for module, size in changed:
            # One more: a chunk that is full is not padded, and traced in another way.
            module.chunk_size = min(size, STEP + 1)
        yield
    finally:
        for module, size in changed:
            module.chunk_size = size
