"""The engine under every calibrated method: all samples through one segment of the graph at a time.

`Sweep` cuts the graph and runs it; `solve_sites` solves sites in waves over it, and resumes; `reducers` gather statistics.
"""

from __future__ import annotations

from typing import Any

_WHERE = {"Sweep": "sweep", "Segment": "sweep", "Group": "order", "Wave": "order", "Costs": "budget", "solve_sites": "solve"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


__all__ = ["Costs", "Group", "Segment", "Sweep", "Wave", "solve_sites"]
