"""Constants of a graph: read them through what only relabels them, and write new ones under dotted names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# What hands its first argument on unchanged, or in another layout or type: a weight is looked through these.
_RELABELLING = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.expand.default,
        aten.lift_fresh_copy.default,
        aten.mT.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten._to_copy.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)

# Of these, on a matrix: what swaps its two axes.
TRANSPOSING = frozenset(
    {aten.mT.default, aten.numpy_T.default, aten.permute.default, aten.t.default, aten.transpose.int}
)


@dataclass(frozen=True)
class Constant:
    """A constant and the ops between it and its use.

    Attributes:
        name: dotted name of the parameter or buffer.
        chain: the ops, the first applied first; empty when it is used as it is.
    """

    name: str
    chain: tuple[Node, ...]

    def value(self, module: GraphModule) -> torch.Tensor:
        """The constant as its user sees it."""
        tensor = attribute(module, self.name).detach()
        for node in self.chain:
            tensor = cast(Callable[..., torch.Tensor], node.target)(tensor, *node.args[1:], **node.kwargs)
        return tensor


def constant_of(argument: object) -> Constant | None:
    """The constant that `argument` shows, looked at through ops that only relabel; None when it is not one."""
    chain: list[Node] = []
    node = argument
    while isinstance(node, Node):
        if node.op == "get_attr":
            return Constant(str(node.target), tuple(reversed(chain)))
        others = node.all_input_nodes[1:]
        if node.op != "call_function" or node.target not in _RELABELLING or others:
            return None
        chain.append(node)
        node = node.args[0]
    return None


def attribute(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def has_attribute(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return False


def set_parameter(module: GraphModule, name: str, value: torch.Tensor) -> None:
    """Create or replace the parameter of that dotted name, with the modules on the way where there are none."""
    owner_name, _, leaf = name.rpartition(".")
    owner: torch.nn.Module = module
    for part in owner_name.split(".") if owner_name else ():
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    made = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
    owner.register_parameter(leaf, made)


def free_name(module: GraphModule, name: str) -> str:
    """`name`, or the first of `name_1`, `name_2` … that no constant has."""
    number = 0
    while has_attribute(module, f"{name}_{number}" if number else name):
        number += 1
    return f"{name}_{number}" if number else name


def rename(module: GraphModule, name: str, to: str) -> None:
    """Give the constant of that dotted name another one, which must be free; whatever reads it reads it there."""
    owner, _, leaf = name.rpartition(".")
    held = module.get_submodule(owner)
    parameter, value = leaf in held._parameters, attribute(module, name)
    delattr(held, leaf)
    if parameter:
        set_parameter(module, to, value)
    else:
        add_buffer(module, to, value)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.target = to


def readers(module: GraphModule, name: str) -> list[Node]:
    """Nodes that read the constant of that name."""
    return [user for node in module.graph.nodes if node.op == "get_attr" and node.target == name for user in node.users]


def storage_key(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Equal for two tensors that show the same numbers in the same storage."""
    return (
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


def add_buffer(module: GraphModule, name: str, value: torch.Tensor) -> str:
    """Register `value` as a buffer under a dotted name, making the modules on the way; returns the name."""
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
    for table in ("_parameters", "_buffers"):
        for prefix, owner in list(module.named_modules()):
            for leaf in list(getattr(owner, table)):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if name not in used:
                    del getattr(owner, table)[leaf]
                    dropped.append(name)
    return dropped
