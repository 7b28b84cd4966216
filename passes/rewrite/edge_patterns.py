"""What stands around a linear op in a graph: a gated half, a normed input. Found by what the nodes compute alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph
from qcompiler.ops.linear_edges import Gate

aten = torch.ops.aten

_SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default})
_GELU = {"none": Gate.GELU, "tanh": Gate.GELU_TANH}


@dataclass(frozen=True)
class Halves:
    """The last axis of a product, split in two of equal size; `nodes` are the split and what picks its parts."""

    first: Node
    second: Node
    nodes: tuple[Node, ...]


def halves(product: Node) -> Halves | None:
    """Where the product is only read in two equal parts."""
    users = list(product.users)
    if len(users) != 1 or users[0].target not in _SPLITS:
        return None
    split = users[0]
    described = split.meta["val"]
    axis = args(split)[2] if len(args(split)) > 2 else split.kwargs.get("dim", 0)
    if axis not in (-1, described[0].dim() - 1) or len({str(part.shape[-1]) for part in described}) != 1:
        return None
    parts = {args(user)[1]: user for user in split.users}
    if len(described) != 2 or len(parts) != 2 or len(split.users) != 2:
        return None
    return Halves(parts[0], parts[1], (*parts.values(), split))


def activation_of(node: Node) -> Gate | None:
    """The activation that a node applies to its first argument."""
    if node.target is aten.silu.default:
        return Gate.SILU
    if node.target is aten.gelu.default:
        approximate = args(node)[1] if len(args(node)) > 1 else node.kwargs.get("approximate", "none")
        return _GELU.get(str(approximate))
    return None


def gated(first: Node, second: Node) -> tuple[Gate, Node, Node] | None:
    """(activation, its node, the product) where nothing is done with two values but act(first) · second."""
    if len(first.users) != 1 or len(second.users) != 1:
        return None
    (active,), (times,) = first.users, second.users
    gate = activation_of(active)
    if gate is None or times.target is not aten.mul.Tensor or list(active.users) != [times]:
        return None
    return (gate, active, times) if set(args(times)) == {active, second} else None


def multiplied(first: Node, second: Node) -> bool:
    """Whether one value is multiplied with something that a few ops make of the other: a gate of some kind."""
    for value, other in ((first, second), (second, first)):
        for user in value.users:
            if user.target is aten.mul.Tensor and any(_made_of(a, other) for a in args(user) if a is not value):
                return True
    return False


def _made_of(value: Any, source: Node, steps: int = 8) -> bool:
    layer = list(value.all_input_nodes) if isinstance(value, Node) else []
    for _ in range(steps):
        if value is source or source in layer:
            return True
        layer = [node for above in layer for node in above.all_input_nodes if node is not above][:64]
    return False


@dataclass(frozen=True)
class Norm:
    """x · rsqrt(mean(x²) + epsilon) · weight over the last axis, whose value is `node`."""

    node: Node
    x: Node
    weight: Node
    epsilon: float


def norms(graph: Graph) -> Iterator[Norm | tuple[Node, str]]:
    """Every root-mean-square norm of the graph; (node, why) for those that have no weight of their own."""
    for node in graph.nodes:
        if node.target is aten.rms_norm.default:
            x, shape, weight, epsilon = [*args(node), None, None][:4]
            if isinstance(weight, Node) and len(shape) == 1:
                yield Norm(node, x, weight, torch.finfo(torch.float32).eps if epsilon is None else epsilon)
            else:
                yield node, "a norm without a weight, or over several axes"
        elif (found := _root_mean_square(node)) is not None:
            x, epsilon = found
            scaled = _only_user(node)
            if scaled is None or scaled.target is not aten.mul.Tensor or set(args(scaled)) != {x, node}:
                continue
            result = _only_user(scaled)
            other = None if result is None else _other(result, scaled)
            if result is None or other is None or not _is_row(other, x):
                yield scaled, "a norm without a weight"
            else:
                yield Norm(result, x, other, epsilon)


def _root_mean_square(node: Node) -> tuple[Node, float] | None:
    """(x, epsilon) of `rsqrt(mean(x²) + epsilon)`."""
    if node.target is not aten.rsqrt.default and not (
        node.target is aten.pow.Tensor_Scalar and args(node)[1] == -0.5
    ):
        return None
    shifted = args(node)[0]
    if shifted.target not in (aten.add.Tensor, aten.add.Scalar) or not isinstance(args(shifted)[1], (int, float)):
        return None
    mean, epsilon = args(shifted)[:2]
    if mean.target is not aten.mean.dim or len(args(mean)) < 3 or not args(mean)[2]:
        return None
    square, axes = args(mean)[:2]
    x = args(square)[0] if isinstance(square, Node) and square.args else None
    squares = square.target is aten.pow.Tensor_Scalar and args(square)[1] == 2
    squares = squares or (square.target is aten.mul.Tensor and args(square)[1] is x)
    if not squares or not isinstance(x, Node) or list(axes) not in ([-1], [x.meta["val"].dim() - 1]):
        return None
    return x, float(epsilon)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(product: Node, factor: Node) -> Node | None:
    """What `factor` is multiplied with."""
    if product.target is not aten.mul.Tensor:
        return None
    others = [a for a in args(product) if a is not factor]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _is_row(weight: Node, x: Node) -> bool:
    """Whether a value has one number for every column of x and no other axis."""
    shape: tuple[Any, ...] = tuple(getattr(weight.meta.get("val"), "shape", ()))
    return len(shape) == 1 and str(shape[0]) == str(x.meta["val"].shape[-1])


def constant_value(graph: Graph, node: Node) -> torch.Tensor | None:
    """The value of a node that constants alone determine, in float32; None where anything else does."""
    if node.op == "get_attr":
        return graph.constant(str(node.target)).float()
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    known: dict[Node, torch.Tensor] = {}
    for source in node.all_input_nodes:
        value = constant_value(graph, source)
        if value is None:
            return None
        known[source] = value
    target: Any = node.target
    return target(*torch.fx.node.map_arg(node.args, known.__getitem__), **torch.fx.node.map_arg(node.kwargs, known.__getitem__))
