"""Lower to torch: one exported program with flat inputs and outputs, on our ops.

The cache goes in and out as plain tensors, in the order of the manifest, so the program loads with torch alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.feeds import arguments
from qcompiler.capture.ports import Port, input_port, output_port
from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError


def flatten(program: torch.export.ExportedProgram, prepared: Prepared) -> torch.export.ExportedProgram:
    """The program with its arguments as one tuple of tensors and its results as another.

    Raises:
        UnsupportedError: torch cannot export the flat graph.
    """
    module = program.module(check_guards=False)
    tensors = tuple(get_leaf_tensors(arguments(prepared)).values())
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module = torch.fx.GraphModule(module, module.graph)  # without the hook that checks the nested arguments
    shapes = tuple(
        dict.fromkeys(prepared.axes.get(path, {}), torch.export.Dim.AUTO)
        for path in get_leaf_tensors(arguments(prepared))
    )
    try:
        return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise UnsupportedError(
            f"{prepared.description}: torch cannot export the quantized graph: {type(error).__name__}: {error}"
        ) from error


def ports(prepared: Prepared) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of the flat program, in order, with what each means."""
    inputs = [
        input_port(path, _shape(tensor, prepared.axes.get(path, {})), _dtype(tensor))
        for path, tensor in get_leaf_tensors(arguments(prepared)).items()
    ]
    with torch.no_grad():
        results: Any = prepared.module(**prepared.example())
    named = get_leaf_tensors(results if not isinstance(results, torch.Tensor) else {"output": results})
    outputs = [
        output_port(path, _shape(tensor, _grown(path, prepared)), _dtype(tensor)) for path, tensor in named.items()
    ]
    return inputs, outputs


def _grown(path: str, prepared: Prepared) -> dict[int, str]:
    """Axes of an output: a cache's grows; anything else runs along the new tokens."""
    if path in prepared.axes:
        return dict.fromkeys(prepared.axes[path], "total_length")
    batch = {0: "batch"} if any(0 in axes for axes in prepared.axes.values()) else {}
    return (
        batch
        if path == "pooler_output"
        else {**batch, 1: "length"}
        if prepared.kind == "decoder" or path in ("last_hidden_state", "logits")
        else batch
    )


def _shape(tensor: torch.Tensor, axes: dict[int, str]) -> tuple[int | str, ...]:
    return tuple(axes.get(axis, size) for axis, size in enumerate(tensor.shape))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def save(program: torch.export.ExportedProgram, path: Path) -> int:
    """Write the program; returns the bytes of its tensors."""
    program.example_inputs = None  # they are calibration data of no use to a runtime
    torch.export.save(program, path)
    return sum(
        t.numel() * t.element_size()
        for t in [*program.state_dict.values(), *program.constants.values()]
        if isinstance(t, torch.Tensor)
    )
