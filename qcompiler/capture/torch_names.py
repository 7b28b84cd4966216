"""torch's own functions for code that runs inside an exporter.

While an exporter traces, torch has functions of the exporter's in place of some of its own: ones that can be written in ONNX.
`torch.randperm` then draws from another generator than the one it is given, for instance. What computes must not see them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

_NAMESPACES = (torch, torch.Tensor, functional, torch.fft, torch.linalg, torch.masked, torch.special)


class TorchNames:
    """What the names of torch stand for at the time of construction."""

    def __init__(self) -> None:
        self._held = [(space, name, _value(space, name)) for space in _NAMESPACES for name in dir(space) if name[:2] != "__"]

    @contextlib.contextmanager
    def as_they_were(self) -> Iterator[None]:
        """Inside the block every name stands for what it stood for; behind it, for what it did before the block."""
        replaced = [(space, name, value, now) for space, name, value in self._held if (now := _value(space, name)) is not value]
        for space, name, value, _ in replaced:
            setattr(space, name, value)
        try:
            yield
        finally:
            for space, name, _, now in replaced:
                setattr(space, name, now)


def _value(space: Any, name: str) -> Any:
    """Without binding: a method that is looked up through its class is another object each time."""
    return inspect.getattr_static(space, name, None)
