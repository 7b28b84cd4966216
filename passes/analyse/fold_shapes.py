"""Sizes of a graph's values as numbers: every symbolic axis gets a small size of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

# At least 2, so that an axis that varies is never taken for one that has a single element.
_SIZES = (3, 2, 5, 7, 11, 13, 17, 19, 23)


class Sizes:
    """One binding of the symbols of a graph, made as they are met."""

    def __init__(self) -> None:
        self._bound: dict[Any, int] = {}

    def size(self, value: Any) -> Any:
        """A symbolic size as a number; anything else as it is."""
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            count = len(self._bound)
            self._bound.setdefault(symbol, _SIZES[count] if count < len(_SIZES) else _SIZES[-1] + 2 * count)
        return int(expression.xreplace(self._bound))

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a tensor's node."""
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def concrete(self, argument: Any) -> Any:
        """An argument without symbols: nodes that hold sizes become numbers, other nodes stay."""
        if isinstance(argument, Node):
            value = argument.meta.get("val")
            return self.size(value) if isinstance(value, (torch.SymInt, int)) else argument
        if isinstance(argument, (list, tuple)):
            return [self.concrete(item) for item in argument]
        return self.size(argument)


def run(node: Node, tensor: torch.Tensor, sizes: Sizes) -> Any:
    """The node's op applied to `tensor` in place of its first argument: what only moves elements moves any."""
    rest = [sizes.concrete(argument) for argument in node.args[1:]]
    kwargs = {key: sizes.concrete(value) for key, value in node.kwargs.items()}
    return node.target(tensor, *rest, **kwargs)  # type: ignore[operator]
