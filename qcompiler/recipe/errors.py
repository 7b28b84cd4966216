"""Errors of recipes that say where, what, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_key(what: str, found: str, known: Iterable[str]) -> str:
    """`unknown pass 'round_nearest'; did you mean 'round_to_nearest'? Known: ...`"""
    known = sorted(known)
    close = difflib.get_close_matches(str(found), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {found!r}{hint} Known: {', '.join(known)}"
