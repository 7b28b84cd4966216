"""How many bytes the values of a graph take for samples of a given size, from its symbolic shapes: nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

UNKNOWN = 64  # stands for a size that depends on data and not on shapes


def bindings(placeholders: Sequence[Node], leaves: Sequence[Any]) -> dict[Any, int]:
    """Symbol -> size, from the graph's inputs and the values that they are fed."""
    found: dict[Any, int] = {}
    for node, leaf in zip(placeholders, leaves, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(leaf, torch.Tensor):
            continue
        for size, actual in zip(value.shape, leaf.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = int(actual)
    return found


def size_of(size: Any, bound: Mapping[Any, int]) -> int:
    """One dimension as a number."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr.xreplace(bound)
    return UNKNOWN if getattr(expression, "free_symbols", None) else int(expression)


def value_bytes(value: Any, bound: Mapping[Any, int]) -> int:
    """Bytes of a node's `meta["val"]`: a tensor, or several."""
    if isinstance(value, torch.Tensor):
        count = value.element_size()
        for size in value.shape:
            count *= size_of(size, bound)
        return count
    if isinstance(value, (list, tuple)):
        return sum(value_bytes(item, bound) for item in value)
    return 0


def node_bytes(node: Node, bound: Mapping[Any, int]) -> int:
    """Bytes of the node's result."""
    return value_bytes(node.meta.get("val"), bound)
