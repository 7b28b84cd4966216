"""New calls in a traced graph, described as the tracer would have described them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

T = TypeVar("T")

_ORIGIN = ("nn_module_stack", "source_fn_stack", "stack_trace")


def under_mode(like: Any, compute: Callable[[], T]) -> T:
    """What `compute` gives in the fake mode of `like`, a described value of the graph; as it is where that has none."""
    mode = getattr(like, "fake_mode", None)
    with mode if mode is not None else contextlib.nullcontext():
        return compute()


def call(module: GraphModule, target: Any, arguments: tuple[Any, ...], like: Node) -> Node:
    """A new call at the point of insertion; its meta value is what the target makes of the arguments' meta values.

    `like` is a node of the traced graph with a tensor: the new one belongs to the same module, in the same fake mode.
    """
    node = module.graph.call_function(target, arguments)
    values = cast(tuple[Any, ...], map_arg(arguments, lambda source: source.meta["val"]))
    value = under_mode(like.meta["val"], lambda: cast(Callable[..., Any], target)(*values))
    node.meta = {key: like.meta[key] for key in _ORIGIN if key in like.meta} | {"val": value}
    return node
