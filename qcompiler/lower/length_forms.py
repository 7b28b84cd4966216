"""The forms in which a value that depends on lengths alone is known: single numbers, and formulas of the indices.

`Items` are the entries of a scalar or short vector, each a sum of lengths: `[1, new, past + new]`. A `Field` is a
tensor whose every element is one formula of its indices: positions (a sum), a mask (which index pairs may attend), a
bias made of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.lower.affine import ONE, Affine, axis


class Unknown(Exception):
    """This value is not one of the known forms."""


UNKNOWN_DIM = Affine.symbol("?")


@dataclass(frozen=True)
class Mask:
    """True where every one of `limits` is 0 or less (where it is not, when `negated`)."""

    limits: frozenset[Affine]
    negated: bool = False


@dataclass(frozen=True)
class Bias:
    """A number added to attention scores: 0 where `allowed`, `blocked` elsewhere."""

    allowed: Mask
    blocked: float


@dataclass(frozen=True)
class Count:
    """How many keys (the last axis of what was summed) `mask` allows; `offset` is the number of keys less queries."""

    mask: Mask
    offset: Affine


Formula = Affine | Mask | Bias | Count


@dataclass(frozen=True)
class Items:
    """The entries of an integer scalar or vector."""

    values: tuple[Affine, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Field:
    """A tensor of `shape` whose element at indices `axis(0)`, `axis(1)` … (from the last axis) is `formula`."""

    shape: tuple[Affine, ...]
    formula: Formula


Known = Items | Field


NOWHERE = Mask(frozenset([ONE]))


# ---- what a form says


def is_never(mask: Formula) -> bool:
    """Whether a mask is false everywhere."""
    return isinstance(mask, Mask) and not mask.negated and any(limit.number == 1 for limit in mask.limits)


def allows_all_causal(field: Field) -> bool:
    """Whether a bias `[..., queries, keys]` is 0 wherever the key is not after the query.

    The queries are the last of the keys. What the bias blocks is then blocked by causal attention anyway.
    """
    if not isinstance(field.formula, Bias) or field.formula.allowed.negated or len(field.shape) < 2:
        return False
    queries, keys = field.shape[-2:]
    causal = Affine.symbol(axis(0)) - Affine.symbol(axis(1)) - (keys - queries)
    return all((limit - causal).never_positive() for limit in field.formula.allowed.limits)


# ---- shapes and formulas


def broadcast(a: Sequence[Affine], b: Sequence[Affine]) -> tuple[Affine, ...]:
    rank = max(len(a), len(b))
    left, right = ((ONE,) * (rank - len(x)) + tuple(x) for x in (a, b))
    shape = []
    for x, y in zip(left, right, strict=True):
        if x != y and ONE not in (x, y):
            raise Unknown
        shape.append(y if x == ONE else x)
    return tuple(shape)


def reshaped(source: Sequence[Affine], target: Sequence[int], zero_is_empty: bool) -> tuple[Affine, ...] | None:
    """The shape that `Reshape` gives, None where that cannot be told."""
    if 0 in target and (zero_is_empty or any(n == 0 and at >= len(source) for at, n in enumerate(target))):
        return None
    shape = [source[at] if n == 0 else Affine(n) for at, n in enumerate(target)]
    if -1 not in target:
        return tuple(shape)
    # The free axis takes what the others leave: one length at most, and a whole number.
    left, lengths = 1, [dim for dim in source if dim.number is None]
    for dim in source:
        left *= dim.number or 1
    taken = 1
    for at, dim in enumerate(shape):
        if target[at] == -1:
            continue
        if dim.number is not None:
            taken *= dim.number
        elif dim in lengths:
            lengths.remove(dim)
        else:
            return None
    if len(lengths) > 1 or taken < 1 or left % taken:
        return None
    shape[target.index(-1)] = (lengths[0] if lengths else ONE) * (left // taken)
    return tuple(shape)


def substitute(formula: Formula, values: dict[str, Affine]) -> Formula:
    if isinstance(formula, Affine):
        return formula.substitute(values)
    if isinstance(formula, Mask):
        return Mask(frozenset(limit.substitute(values) for limit in formula.limits), formula.negated)
    if isinstance(formula, Bias):
        allowed = substitute(formula.allowed, values)
        assert isinstance(allowed, Mask)
        return Bias(allowed, formula.blocked)
    raise Unknown
