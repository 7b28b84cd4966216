"""Views of a part of a tensor's last axis: rows lie further apart than they are long, which not every `view` can express."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from qcompiler.graph.calls import under_mode

aten = torch.ops.aten

# What gives its input's own memory, in other strides.
_VIEWS = frozenset(
    {
        aten.alias.default, aten.detach.default, aten.expand.default, aten.permute.default, aten.reshape.default,
        aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten.unflatten.int,
        aten.unsqueeze.default, aten.view.default,
    }
)  # fmt: skip


def reshape_strided_views(parts: Iterable[Node]) -> int:
    """Turn every `view` that the strides of `parts` do not allow into a `reshape`, which copies there; returns how many.

    `parts` are nodes whose described value has new strides; what is a view of them is described anew.
    """
    changed = 0
    queue = list(parts)
    for node in queue:
        for user in node.users:
            if user.target not in _VIEWS or user.args[0] is not node:
                continue
            try:
                user.meta["val"] = _value(user)
            except (RuntimeError, ValueError):  # "view size is not compatible with input tensor's size and stride"
                if user.target is not aten.view.default:
                    raise
                user.target = aten.reshape.default
                user.meta["val"] = _value(user)
                changed += 1
            queue.append(user)
    return changed


def _value(node: Node) -> Any:
    arguments = cast(tuple[Any, ...], map_arg(node.args, lambda source: source.meta["val"]))
    target = cast(Any, node.target)
    return under_mode(node.meta["val"], lambda: target(*arguments, **node.kwargs))
