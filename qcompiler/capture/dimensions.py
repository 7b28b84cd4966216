"""Give the axes that vary the names that we use for them."""

from __future__ import annotations

import re

import onnx_ir

from qcompiler.capture.ports import Port, input_port, output_port

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_TOTAL = {"past_length + length", "length + past_length"}


def name_dimensions(model: onnx_ir.Model, axes: dict[str, dict[int, str]]) -> None:
    """Rename the tracer's symbols everywhere in `model`:   s70, s36 + s70  ─▶  length, total_length"""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        wanted = axes.get(value.name.removeprefix("input."), {})
        for axis, dimension in enumerate(value.shape):
            if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value is not None and axis in wanted:
                names.setdefault(dimension.value, wanted[axis])

    def renamed(expression: str) -> str:
        text = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), expression)
        return "total_length" if text in _TOTAL else text

    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in values:
            if value.shape is None or not any(isinstance(dimension, onnx_ir.SymbolicDim) for dimension in value.shape):
                continue
            value.shape = onnx_ir.Shape(
                renamed(dimension.value)
                if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value is not None
                else dimension
                for dimension in value.shape
            )


def ports(model: onnx_ir.Model) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an exported model, with what each means."""
    return (
        [input_port(value.name, _shape(value), _dtype(value)) for value in model.graph.inputs],
        [output_port(value.name, _shape(value), _dtype(value)) for value in model.graph.outputs],
    )


def _shape(value: onnx_ir.Value) -> tuple[int | str, ...]:
    if value.shape is None:
        return ()
    return tuple(
        dimension if isinstance(dimension, int) else dimension.value or f"axis{axis}"
        for axis, dimension in enumerate(value.shape)
    )


def _dtype(value: onnx_ir.Value) -> str:
    names = {"float": "float32", "double": "float64"}
    name = value.dtype.name.lower() if value.dtype is not None else "undefined"
    return names.get(name, name)
