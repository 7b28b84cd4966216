"""Constants of a GraphModule: find, add, drop those that nothing reads."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def get(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def add_buffer(module: GraphModule, name: str, value: torch.Tensor) -> str:
    """Register `value` under a dotted name, making the modules on the way; returns the name."""
    owner: torch.nn.Module = module
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner.register_buffer(leaf, value)
    return name


def drop_unused(module: GraphModule) -> list[str]:
    """Delete parameters and buffers that no `get_attr` reads; returns their names. Frees the float weights."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    dropped = []
    for kind in ("_parameters", "_buffers"):
        for prefix, owner in list(module.named_modules()):
            for leaf in list(getattr(owner, kind)):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if name not in used:
                    del getattr(owner, kind)[leaf]
                    dropped.append(name)
    return dropped


def is_constant(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"
