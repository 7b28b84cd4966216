"""What each operator does to the forms of `length_forms`: one small rule an operator, none where it cannot be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.lower.affine import ONE, Affine, axis
from qcompiler.lower.constants import scalar
from qcompiler.lower.length_forms import (
    NOWHERE,
    UNKNOWN_DIM,
    Bias,
    Count,
    Field,
    Items,
    Known,
    Mask,
    Unknown,
    broadcast,
    substitute,
)  # fmt: skip

if TYPE_CHECKING:
    from qcompiler.lower.lengths import Knowledge


def _shape(known: Knowledge, node: ir.Node) -> Known:
    dims = known.dims(node.inputs[0])
    picked = dims[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims)))]
    if UNKNOWN_DIM in picked:
        raise Unknown
    return Items(tuple(picked))


def _squeeze(known: Knowledge, node: ir.Node) -> Known:
    return Items((known.one(node.inputs[0]),), scalar=True)


def _reshape(known: Knowledge, node: ir.Node) -> Known:
    number = known.one(node.inputs[0])
    target = known.numbers(node.inputs[1])
    if target in ([-1], [1]):
        return Items((number,))
    if target == []:
        return Items((number,), scalar=True)
    raise Unknown


def _unsqueeze(known: Knowledge, node: ir.Node) -> Known:
    source = known.get(node.inputs[0])
    if isinstance(source, Items) and source.scalar:
        return Items(source.values)
    source = known.field(node.inputs[0])
    rank = len(source.shape)
    added = known.numbers(node.inputs[1])
    total = rank + len(added)
    new_axes = {a % total for a in added}
    kept = [a for a in range(total) if a not in new_axes]
    renamed = {axis(rank - 1 - old): Affine.symbol(axis(total - 1 - new)) for old, new in enumerate(kept)}
    shape = [ONE] * total
    for old, new in enumerate(kept):
        shape[new] = source.shape[old]
    return Field(tuple(shape), substitute(source.formula, renamed))


def _gather(known: Knowledge, node: ir.Node) -> Known:
    source, index = known.items(node.inputs[0]), known.items(node.inputs[1])
    numbers = known.numbers(node.inputs[1])
    if source.scalar or len(numbers) != 1 or not -len(source.values) <= numbers[0] < len(source.values):
        raise Unknown
    return Items((source.values[numbers[0]],), scalar=index.scalar)


def _concat(known: Knowledge, node: ir.Node) -> Known:
    parts = [known.items(value) for value in node.inputs]
    if any(part.scalar for part in parts):
        raise Unknown
    return Items(tuple(value for part in parts for value in part.values))


def _range(known: Knowledge, node: ir.Node) -> Known:
    start, limit, step = (known.one(value) for value in node.inputs)
    if step != ONE or not (limit - start).never_negative():
        raise Unknown
    return Field((limit - start,), start + Affine.symbol(axis(0)))


def _cast(known: Knowledge, node: ir.Node) -> Known:
    source = known.get(node.inputs[0])
    to = ir.DataType(node.attributes.get_int("to"))
    whole = isinstance(source, Items) or isinstance(source.formula, Affine)
    if whole and to not in (ir.DataType.INT32, ir.DataType.INT64):
        raise Unknown
    # A mask stays the same mask, as numbers 1 and 0.
    return source


def _expand(known: Knowledge, node: ir.Node) -> Known:
    source, target = known.get(node.inputs[0]), known.items(node.inputs[1]).values
    if isinstance(source, Items):
        if target == (ONE,) and len(source.values) == 1:
            return Items(source.values)
        raise Unknown
    return Field(broadcast(source.shape, target), source.formula)


def _sum(sign: int) -> Callable[[Knowledge, ir.Node], Known]:
    def rule(known: Knowledge, node: ir.Node) -> Known:
        a, b = (known.get(value) for value in node.inputs)
        if isinstance(a, Items) and isinstance(b, Items):
            return _itemwise(a, b, lambda x, y: x + y * sign)
        left, right = (known.field(value) for value in node.inputs)
        if not isinstance(left.formula, Affine) or not isinstance(right.formula, Affine):
            raise Unknown
        return Field(broadcast(left.shape, right.shape), left.formula + right.formula * sign)

    return rule


def _mul(known: Knowledge, node: ir.Node) -> Known:
    for one, other in (node.inputs, tuple(reversed(node.inputs))):
        factor = scalar(other)
        if factor is None or one is None:
            continue
        source = known.values.get(one)
        if isinstance(source, Items) and factor == int(factor):
            return _itemwise(source, known.items(other), lambda x, y: x * y.constant)
        if isinstance(source, Field) and isinstance(source.formula, Mask):
            mask = source.formula
            return Field(source.shape, Bias(Mask(mask.limits, not mask.negated), factor))
    raise Unknown


def _max(known: Knowledge, node: ir.Node) -> Known:
    def larger(x: Affine, y: Affine) -> Affine:
        if (x - y).never_negative():
            return x
        if (y - x).never_negative():
            return y
        raise Unknown

    if len(node.inputs) != 2:
        raise Unknown
    return _itemwise(known.items(node.inputs[0]), known.items(node.inputs[1]), larger)


def _compare(sign: int, strict: bool) -> Callable[[Knowledge, ir.Node], Known]:
    """`sign * (left - right) <= 0`, or `< 0`."""

    def rule(known: Knowledge, node: ir.Node) -> Known:
        left = known.field(node.inputs[0])
        if isinstance(left.formula, Count):
            # "Fewer than one": the queries that may attend nowhere. Proven to be none, else unknown.
            if scalar(node.inputs[1]) == 1.0 and strict and sign == 1 and _somewhere(left.formula):
                return Field(left.shape, NOWHERE)
            raise Unknown
        right = known.field(node.inputs[1])
        if not isinstance(left.formula, Affine) or not isinstance(right.formula, Affine):
            raise Unknown
        limit = (left.formula - right.formula) * sign + (ONE if strict else Affine())
        return Field(broadcast(left.shape, right.shape), Mask(frozenset([limit])))

    return rule


def _somewhere(count: Count) -> bool:
    """Whether every query may attend to one key at least: to the one at its own position."""
    diagonal = {axis(0): Affine.symbol(axis(1)) + count.offset}
    return count.offset.never_negative() and all(
        limit.substitute(diagonal).never_positive() for limit in count.mask.limits
    )


def _and(known: Knowledge, node: ir.Node) -> Known:
    left, right = (known.field(value) for value in node.inputs)
    if not isinstance(left.formula, Mask) or not isinstance(right.formula, Mask):
        raise Unknown
    if left.formula.negated or right.formula.negated:
        raise Unknown
    return Field(broadcast(left.shape, right.shape), Mask(left.formula.limits | right.formula.limits))


def _not(known: Knowledge, node: ir.Node) -> Known:
    source = known.field(node.inputs[0])
    if not isinstance(source.formula, Mask):
        raise Unknown
    return Field(source.shape, Mask(source.formula.limits, not source.formula.negated))


def _where(known: Knowledge, node: ir.Node) -> Known:
    source = known.field(node.inputs[0])
    chosen, other = scalar(node.inputs[1]), scalar(node.inputs[2])
    if not isinstance(source.formula, Mask) or chosen is None or other is None:
        raise Unknown
    mask = source.formula
    if chosen == 0:
        return Field(source.shape, Bias(mask, other))
    if other == 0:
        return Field(source.shape, Bias(Mask(mask.limits, not mask.negated), chosen))
    raise Unknown


def _reduce_sum(known: Knowledge, node: ir.Node) -> Known:
    source = known.field(node.inputs[0])
    rank = len(source.shape)
    kept = node.attributes.get_int("keepdims", 1) == 1
    if not isinstance(source.formula, Mask) or source.formula.negated or rank < 2 or not kept:
        raise Unknown
    if known.numbers(node.inputs[1]) not in ([-1], [rank - 1]):
        raise Unknown
    queries, keys = source.shape[-2:]
    return Field((*source.shape[:-1], ONE), Count(source.formula, keys - queries))


def _transpose(known: Knowledge, node: ir.Node) -> Known:
    source = known.field(node.inputs[0])
    rank = len(source.shape)
    order = node.attributes.get_ints("perm", list(reversed(range(rank))))
    renamed = {axis(rank - 1 - old): Affine.symbol(axis(rank - 1 - new)) for new, old in enumerate(order)}
    return Field(tuple(source.shape[old] for old in order), substitute(source.formula, renamed))


def _same(known: Knowledge, node: ir.Node) -> Known:
    return known.get(node.inputs[0])


RULES: dict[str, Callable[[Knowledge, ir.Node], Known | None]] = {
    "Shape": _shape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Gather": _gather,
    "Concat": _concat,
    "Range": _range,
    "Cast": _cast,
    "Expand": _expand,
    "Add": _sum(1),
    "Sub": _sum(-1),
    "Mul": _mul,
    "Max": _max,
    "LessOrEqual": _compare(1, strict=False),
    "Less": _compare(1, strict=True),
    "GreaterOrEqual": _compare(-1, strict=False),
    "Greater": _compare(-1, strict=True),
    "And": _and,
    "Not": _not,
    "Where": _where,
    "ReduceSum": _reduce_sum,
    "Transpose": _transpose,
    "Identity": _same,
}


def _itemwise(a: Items, b: Items, combine: Callable[[Affine, Affine], Affine]) -> Items:
    count = max(len(a.values), len(b.values))
    if {len(a.values), len(b.values)} - {1, count}:
        raise Unknown
    left, right = (x.values * count if len(x.values) == 1 else x.values for x in (a, b))
    return Items(tuple(map(combine, left, right)), scalar=a.scalar and b.scalar)
