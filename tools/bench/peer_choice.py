"""Which peers a benchmark runs beside ours: the option `--peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from qcompiler.errors import UsageError


class _Named(Protocol):
    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=_Named)


def chosen_sides(families: Mapping[str, Sequence[S]], chosen: str) -> dict[str, S]:
    """The sides of `chosen` by name: none, all, or names of programs (the keys of `families`) and of sides, with commas.

    Raises:
        UsageError: a name that is none of these.
    """
    every = {side.name: side for family in families.values() for side in family}
    found: dict[str, S] = {}
    for name in [] if chosen == "none" else chosen.split(","):
        if name == "all":
            found |= every
        elif name in families:
            found |= {side.name: side for side in families[name]}
        elif name in every:
            found[name] = every[name]
        else:
            raise UsageError(f"unknown peer {name!r}; known: none, all, {', '.join([*families, *every])}")
    return found
