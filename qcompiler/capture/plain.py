"""Plain modules, captured with the example inputs that their author gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UsageError


def prepare_module(module: torch.nn.Module, example: Any, dynamic_shapes: dict[str, Any] | None) -> Prepared:
    """Make any module ready for export; axis 0 varies where the example has at least two rows there.

    `example` is what the module is called with: keyword arguments as a dict, positional ones as a tuple, or one tensor.
    """
    description = type(module).__name__
    inputs = keyword_arguments(module, example)
    if not get_leaf_tensors(inputs):
        raise UsageError(f"{description}: the example inputs hold no tensor; found {sorted(inputs)}")
    notes = []
    shapes = dynamic_shapes
    if shapes is None:
        shapes = {name: _rows(value) for name, value in inputs.items()}
        if not any(tensor.dim() and tensor.shape[0] >= 2 for tensor in get_leaf_tensors(inputs).values()):
            notes.append("no example input has two rows: every axis is fixed")
    else:
        unknown = sorted(set(shapes) - set(inputs))
        if unknown:
            raise UsageError(f"dynamic_shapes names {unknown}, which are no inputs; the inputs are {sorted(inputs)}")
        # torch.export wants every input named; None means that all its axes are fixed.
        shapes = {name: shapes.get(name) for name in inputs}
    return Prepared(module, inputs, shapes, "module", description, _names(shapes), notes=notes)


def keyword_arguments(module: torch.nn.Module, example: Any) -> dict[str, Any]:
    """The example as keyword arguments of the module's `forward`."""
    if isinstance(example, Mapping):
        positional, keywords = (), dict(example)
    else:
        positional, keywords = tuple(example) if isinstance(example, (tuple, list)) else (example,), {}
    try:
        bound = inspect.signature(module.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit {type(module).__name__}.forward: {error}") from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"{type(module).__name__}.forward takes *{name}: wrap it in a module with named inputs")
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def _rows(value: Any) -> Any:
    automatic = torch.export.Dim.AUTO
    if isinstance(value, (torch.Tensor, list, tuple, dict)):
        return tree_map_only(torch.Tensor, lambda x: {0: automatic} if x.dim() and x.shape[0] >= 2 else {}, value)
    return None


def _names(shapes: Any, path: str = "") -> dict[str, dict[int, str]]:
    """Names of the axes that vary, by input path: `batch` for axis 0, the user's own where a `Dim` has one."""
    if isinstance(shapes, (list, tuple)):
        shapes = {str(index): value for index, value in enumerate(shapes)}
    if not isinstance(shapes, dict):
        return {}
    if all(isinstance(axis, int) for axis in shapes):
        return {path: {axis: _axis_name(axis, dimension) for axis, dimension in shapes.items()}} if path else {}
    found: dict[str, dict[int, str]] = {}
    for name, value in shapes.items():
        found.update(_names(value, f"{path}.{name}" if path else name))
    return found


def _axis_name(axis: int, dimension: Any) -> str:
    name = getattr(dimension, "__name__", None)
    return name if name is not None else "batch" if axis == 0 else f"axis{axis}"
