"""Whole numbers written as sums of lengths and indices: `past + new - 1`, `key - query - past`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def axis(from_last: int) -> str:
    """The symbol of a tensor's index along an axis, counted from the last one, which is 0."""
    return f"@{from_last}"


@dataclass(frozen=True)
class Affine:
    """`constant + sum(factor * symbol)`. Symbols are lengths, 0 or more, and indices (`axis`)."""

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def symbol(name: str) -> Affine:
        return Affine(0, ((name, 1),))

    @staticmethod
    def of(constant: int, terms: Mapping[str, int]) -> Affine:
        return Affine(constant, tuple(sorted((name, factor) for name, factor in terms.items() if factor)))

    def __add__(self, other: Affine) -> Affine:
        terms = dict(self.terms)
        for name, factor in other.terms:
            terms[name] = terms.get(name, 0) + factor
        return Affine.of(self.constant + other.constant, terms)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    def __mul__(self, factor: int) -> Affine:
        return Affine.of(self.constant * factor, {name: value * factor for name, value in self.terms})

    @property
    def number(self) -> int | None:
        """The value where it is one fixed number."""
        return None if self.terms else self.constant

    def substitute(self, values: Mapping[str, Affine]) -> Affine:
        """With every symbol that `values` has replaced."""
        result = Affine(self.constant)
        for name, factor in self.terms:
            result += values.get(name, Affine.symbol(name)) * factor
        return result

    def never_positive(self) -> bool:
        """Whether it is 0 or less for all lengths; false also where that cannot be told."""
        return self.constant <= 0 and all(factor < 0 and not name.startswith("@") for name, factor in self.terms)

    def never_negative(self) -> bool:
        return (self * -1).never_positive()


ONE = Affine(1)
