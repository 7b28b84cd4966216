"""Small edits of a graph that keep its meta data true."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompiler.graph.constants import attribute


def get_constant(module: GraphModule, name: str, like: Node) -> Node:
    """A new node that reads the constant of that name, at the point of insertion.

    `like` is any node of the traced graph with a tensor: its fake mode describes the constant. One that is stored in half
    precision is described as float32, which the graph computes in.
    """
    node = module.graph.get_attr(name)
    tensor = attribute(module, name)
    mode = getattr(like.meta.get("val"), "fake_mode", None)
    described = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    node.meta["val"] = described.float() if half else described
    return node


def args(node: Node) -> tuple[Any, ...]:
    """The node's arguments; which of them are nodes follows from its target, where no type checker can see it."""
    return node.args
