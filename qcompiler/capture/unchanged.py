"""Run a model without a trace left in it: some switch their attention over, or keep a state, when they are first run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_TABLES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Behind the block every module has the attributes, parameters and modules again that it had before."""
    kept = [
        (module, dict(vars(module)), {name: dict(getattr(module, name)) for name in _TABLES}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, values, tables in kept:
            for name, content in tables.items():
                values[name].clear()
                values[name].update(content)
            vars(module).clear()
            vars(module).update(values)
