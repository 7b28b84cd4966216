"""Follow values through a graph, up to sites and no further."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

aten = torch.ops.aten

# Products of two computed values.
PRODUCTS = frozenset(
    {aten.baddbmm.default, aten.bmm.default, aten.einsum.default, aten.matmul.default, aten.mm.default}
)
ATTENTIONS = frozenset({aten.scaled_dot_product_attention.default})
SOFTMAXES = frozenset({aten._softmax.default, aten._safe_softmax.default, aten.softmax.int})

# One number in, one number out, and no straight line.
NONLINEAR = frozenset(
    {
        aten.clamp.default, aten.clamp_max.default, aten.clamp_min.default, aten.elu.default, aten.erf.default,
        aten.exp.default, aten.gelu.default, aten.hardsigmoid.default, aten.hardswish.default, aten.hardtanh.default,
        aten.leaky_relu.default, aten.mish.default, aten.pow.Tensor_Scalar, aten.relu.default, aten.relu_.default,
        aten.relu6.default, aten.sigmoid.default, aten.silu.default, aten.silu_.default, aten.softplus.default,
        aten.square.default, aten.tanh.default,
    }
)  # fmt: skip
# Takes a part of the last axis, or several.
PARTS = frozenset(
    {
        aten.chunk.default, aten.narrow.default, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
        aten.unbind.int,
    }
)  # fmt: skip
# The same numbers in another arrangement, scaled or shifted by a constant.
PLAIN = frozenset(
    {
        aten._to_copy.default, aten._unsafe_view.default, aten.alias.default, aten.clone.default,
        aten.contiguous.default, aten.detach.default, aten.dropout.default, aten.expand.default,
        aten.flatten.using_ints, aten.masked_fill.Scalar, aten.neg.default, aten.permute.default,
        aten.reshape.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.to.device, aten.to.dtype,
        aten.to.dtype_layout, aten.transpose.int, aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
    }
)  # fmt: skip
ARITHMETIC = frozenset(
    {
        aten.add.Scalar, aten.add.Tensor, aten.add_.Tensor, aten.div.Scalar, aten.div.Tensor, aten.mul.Scalar,
        aten.mul.Tensor, aten.rsub.Scalar, aten.sub.Scalar, aten.sub.Tensor, aten.where.self,
    }
)  # fmt: skip


def upstream(start: Iterable[Node], stop: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """Walk from values to what they are made of: (nodes where `stop` held, nodes passed on the way), nearest first."""
    stops: list[Node] = []
    passed: list[Node] = []
    queue = list(start)
    seen = set(queue)
    while queue:
        node = queue.pop(0)
        if stop(node):
            stops.append(node)
            continue
        passed.append(node)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return stops, passed


def downstream(start: Node, through: Callable[[Node], bool]) -> list[Node]:
    """Walk from a value to the nodes that read it, going on from those where `through` holds: the others, in order."""
    ends: list[Node] = []
    queue, seen = [start], {start}
    while queue:
        for user in queue.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            if through(user):
                queue.append(user)
            else:
                ends.append(user)
    return ends


def tensors(node: Node) -> list[Node]:
    """The node's inputs that are computed tensors: no constants, no sizes."""
    return [
        source
        for source in node.all_input_nodes
        if source.op != "get_attr" and isinstance(source.meta.get("val"), (torch.Tensor, list, tuple))
    ]
