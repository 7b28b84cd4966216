"""Other programs' kernels, fed with random weights of their own formats; what is not installed is skipped with a word."""

from __future__ import annotations

from tools.bench.kernels_side import Side

FAMILIES: tuple[str, ...] = ()


def sides(chosen: str) -> list[Side]:
    """The sides of `chosen`: none, all, or names of programs and of sides, with commas between them."""
    return []
