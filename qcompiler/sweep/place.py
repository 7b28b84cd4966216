"""Where calibration and solvers compute: values are moved there as they are needed, and what is found comes back."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.utils import _pytree

T = TypeVar("T")
CPU = "cpu"

# Stages whose passes run the graph on samples or work on whole weights; the others look at the graph.
STAGES = ("transform", "observe", "solve")


def working_on(device: str) -> AbstractContextManager[Any]:
    """Within it, tensors made without a device are made on `device`."""
    return nullcontext() if device == CPU else torch.device(device)


def moved(value: T, device: str) -> T:
    """Tensors, alone or in lists, tuples and dicts, on `device`; a dataclass with its own tensors there."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        there = {name: field.to(device) for name, field in fields.items() if isinstance(field, torch.Tensor)}
        changed = {name: tensor for name, tensor in there.items() if tensor is not fields[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return _pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)
