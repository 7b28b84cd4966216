"""What each op does to the labels of a channel scale (see fold_trace.py)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.text import describe
from qcompiler.ops.observe import OBSERVE
from qcompiler.passes.analyse.fold_constants import CASTS, MOVES
from qcompiler.passes.analyse.fold_shapes import run
from qcompiler.passes.analyse.walk import ATTENTIONS

if TYPE_CHECKING:
    from qcompiler.passes.analyse.fold_trace import Trace

aten = torch.ops.aten

_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default})
_SAME = frozenset({aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.dropout.default, OBSERVE})
_REDUCING = frozenset({aten.sum.dim_IntList, aten.mean.dim})
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})

Result = tuple[Any, frozenset[str]]
NOTHING: frozenset[str] = frozenset()


class Blocked(Exception):
    """The op does not commute with the scale; the message says why."""


def propagate(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    """Labels of the node's result, and what kind of step it was.

    Raises:
        Blocked: the scale cannot pass.
    """
    rule = _RULES.get(node.target)
    if rule is None:
        raise Blocked(_refusal(node))
    try:
        return rule(trace, node, passed)
    except (RuntimeError, TypeError, IndexError) as error:
        raise Blocked(f"the channels cannot be followed through {describe(node)}: {str(error).splitlines()[0]}") from error


def _refusal(node: Node) -> str:
    if node.target in _NORMS:
        return f"{describe(node)} normalises the value: it does not commute with a channel scale"
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return f"{describe(node)} writes in place"
    return f"{describe(node)} does not commute with a channel scale"


def _need(trace: Trace, node: Node, value: object) -> torch.Tensor:
    labels = trace.labels(value)
    if labels is None:
        raise Blocked(f"{describe(node)} does not commute with a channel scale")
    return labels


def _moves(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    return run(node, _need(trace, node, args(node)[0]), trace.sizes), NOTHING


def _same(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    if not node.meta["val"].dtype.is_floating_point:
        raise Blocked(f"{describe(node)} rounds the value to {node.meta['val'].dtype}")
    return _need(trace, node, args(node)[0]), NOTHING


def _homogeneous(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    return _need(trace, node, args(node)[0]), frozenset({"relu"})


def _part(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    return trace.parts(args(node)[0])[args(node)[1]], NOTHING


def _multiplied(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    left, right = args(node)[:2]
    labels = [trace.labels(left), trace.labels(right)]
    if labels[0] is not None and labels[1] is not None:
        raise Blocked(f"{describe(node)} multiplies two values that both carry the scale")
    carrier, other = (0, right) if labels[0] is not None else (1, left)
    if carrier == 1 and node.target is aten.div.Tensor:
        raise Blocked(f"{describe(node)} divides by the value")
    computed = isinstance(other, Node) and other.op != "get_attr" and trace.constant(other) is None
    computed = computed and isinstance(other.meta.get("val"), torch.Tensor)
    if computed and "attention" in passed and not trace.around.gated_attention:
        raise Blocked(f"{describe(node)} gates the attention's result")
    found = labels[carrier]
    assert found is not None
    return found.expand(trace.sizes.shape(node)), frozenset({"product"}) if computed else NOTHING


def _added(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    left, right = args(node)[:2]
    shape = trace.sizes.shape(node)
    labels = [trace.labels(left), trace.labels(right)]
    if labels[0] is not None and labels[1] is not None:
        return _agreeing(trace, node, labels[0].expand(shape), labels[1].expand(shape))
    found, other = (labels[0], right) if labels[0] is not None else (labels[1], left)
    assert found is not None
    found = found.expand(shape)
    if isinstance(other, (int, float)) and other == 0:
        return found, NOTHING
    view = trace.constant(other)
    if view is not None and not view.offset:
        own = _labels_of_constant(view.elements.expand(shape), found, view.count)
        problem = trace.around.sharing.problem(view.name) or (None if view.alone else f"{view.name} is read in several places")
        if problem is not None:
            raise Blocked(problem)
        if own is not None:
            trace.added.append((view, own))
            return found, NOTHING
    what = "a constant" if not isinstance(other, Node) or other.op == "get_attr" else "a value"
    raise Blocked(f"{describe(node)} adds {what} that does not carry the scale (a residual branch or an offset)")


def _agreeing(trace: Trace, node: Node, left: torch.Tensor, right: torch.Tensor) -> Result:
    equal = left == right
    if not bool(equal.all()):
        reason = f"{describe(node)} adds channels of different scales"
        trace.around.blocked.setdefault(node, reason)
        trace.stop(left[~equal], reason)
        trace.stop(right[~equal], reason)
    return torch.where(equal, left, -1), NOTHING


def _labels_of_constant(elements: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor | None:
    """The label of each element of a constant, or None where one element meets several."""
    own = torch.full((count,), -1, dtype=torch.int64)
    own[elements.reshape(-1)] = labels.reshape(-1)
    return own if bool((own[elements] == labels).all()) else None


def _concatenated(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    values = args(node)[0]
    axis = args(node)[1] if len(args(node)) > 1 else 0
    known = next(labels for value in values if (labels := trace.labels(value)) is not None)
    parts = []
    for value in values:
        labels = trace.labels(value)
        if labels is None:
            shape = trace.sizes.shape(value)
            same = bool((known == known.narrow(axis, 0, 1)).all())
            if value.op == "placeholder" and same:
                if not trace.cached(node, value):
                    raise Blocked(f"{describe(node)} joins the value with {value.target}, an input that does not carry the scale")
                labels = known.narrow(axis, 0, 1).expand(shape)
            else:
                labels = torch.full(shape, -1, dtype=torch.int64)
        parts.append(labels)
    return torch.cat(parts, axis), NOTHING


def _constant_along(labels: torch.Tensor, axis: int) -> bool:
    return bool((labels == labels.narrow(axis, 0, 1)).all())


def _matmul(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    left, right = args(node)[:2]
    labels = [trace.labels(left), trace.labels(right)]
    if labels[0] is not None and labels[1] is not None:
        raise Blocked(f"{describe(node)} multiplies two values that both carry the scale")
    found, axis = (labels[0], -1) if labels[0] is not None else (labels[1], -2)
    assert found is not None
    if found.dim() < 2 or not _constant_along(found, axis):
        raise Blocked(f"{describe(node)} sums over the scaled channels (queries meet keys, or a product of two values)")
    return found.narrow(axis, 0, 1).expand(trace.sizes.shape(node)), frozenset({"attention"})


def _attention(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    value = trace.labels(args(node)[2])
    reason = f"{describe(node)} sums over the scaled channels (queries meet keys)"
    # One linear may make all three: its queries and keys stop here, its values go on.
    for other in (*args(node)[:2], *args(node)[3:]):
        labels = trace.labels(other)
        if labels is not None:
            trace.stop(labels, reason)
    if value is None:
        return torch.full(trace.sizes.shape(node), -1, dtype=torch.int64), NOTHING
    if not _constant_along(value, -2):
        raise Blocked(f"{describe(node)} mixes tokens whose scales differ")
    value = value.narrow(-2, 0, 1)
    shape = trace.sizes.shape(node)
    if node.kwargs.get("enable_gqa"):
        value = value.repeat_interleave(shape[-3] // value.shape[-3], dim=-3)
    return value.expand(shape), frozenset({"attention"})


def _reduced(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    labels = _need(trace, node, args(node)[0])
    axes = args(node)[1]
    if not axes or any(not _constant_along(labels, axis) for axis in axes):
        raise Blocked(f"{describe(node)} sums over the scaled channels")
    kept = len(args(node)) > 2 and args(node)[2]
    rank = labels.dim()
    for axis in sorted((axis % rank for axis in axes), reverse=True):
        labels = labels.narrow(axis, 0, 1) if kept else labels.select(axis, 0)
    return labels, NOTHING


def _indexed(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    labels = _need(trace, node, args(node)[0])
    positions = [(axis, index) for axis, index in enumerate(args(node)[1]) if index is not None]
    if len(positions) != 1:
        raise Blocked(f"{describe(node)} picks by several indices at once")
    ((axis, index),) = positions
    known = _integers(trace, index, labels.shape[axis])
    if known is not None:
        return labels.index_select(axis, known.reshape(-1)).reshape(trace.sizes.shape(node)), NOTHING
    if not _constant_along(labels, axis):
        raise Blocked(f"{describe(node)} picks among the scaled channels by computed indices")
    rank = len(trace.sizes.shape(index))
    one = labels.select(axis, 0)
    return one.reshape(*one.shape[:axis], *[1] * rank, *one.shape[axis:]).expand(trace.sizes.shape(node)), NOTHING


def _integers(trace: Trace, node: Node, size: int) -> torch.Tensor | None:
    """Indices into an axis of `size` that are a constant, counted from the front; else None."""
    while node.op == "call_function" and node.target in (aten.lift_fresh_copy.default, aten.clone.default, *CASTS):
        node = args(node)[0]
    if node.op != "get_attr" or trace.graph.stored(str(node.target)).dtype != torch.int64:
        return None
    index = trace.graph.stored(str(node.target))
    return torch.where(index < 0, index + size, index)


def _filled(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    if args(node)[2] != 0:
        raise Blocked(f"{describe(node)} fills in a number that does not carry the scale")
    return _need(trace, node, args(node)[0]).expand(trace.sizes.shape(node)), NOTHING


def _selected(trace: Trace, node: Node, passed: frozenset[str]) -> Result:
    condition, *sides = args(node)[:3]
    if trace.labels(condition) is not None:
        raise Blocked(f"{describe(node)} chooses by the value")
    shape = trace.sizes.shape(node)
    labels = [trace.labels(side) for side in sides]
    known = [found.expand(shape) for found in labels if found is not None]
    if len(known) == 2:
        return _agreeing(trace, node, known[0], known[1])
    if any(found is None and not _is_zero(trace, side) for found, side in zip(labels, sides, strict=True)):
        raise Blocked(f"{describe(node)} puts a value in place that does not carry the scale")
    return known[0], NOTHING


def _is_zero(trace: Trace, value: object) -> bool:
    """Whether a value is 0 throughout, and so carries any scale."""
    if not isinstance(value, Node):
        return value == 0
    if value.op == "get_attr":
        stored = trace.graph.stored(str(value.target))
        return stored.numel() == 1 and not bool(stored.any())
    if value.target is aten.full.default:
        return args(value)[1] == 0
    return value.target in (aten.zeros.default, aten.zeros_like.default)


_RULES: dict[Any, Callable[[Trace, Node, frozenset[str]], Result]] = {
    **dict.fromkeys(MOVES, _moves),
    **dict.fromkeys(CASTS | _SAME, _same),
    **dict.fromkeys(_HOMOGENEOUS, _homogeneous),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _multiplied),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _added),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **dict.fromkeys(ATTENTIONS, _attention),
    **dict.fromkeys(_REDUCING, _reduced),
    operator.getitem: _part,
    aten.cat.default: _concatenated,
    aten.index.Tensor: _indexed,
    aten.masked_fill.Scalar: _filled,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _selected),
}
