"""Lower to torch: one exported program with flat inputs and outputs, on our ops.

The cache goes in and out as plain tensors, in the order of the manifest, so the program loads with torch alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.feeds import arguments
from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError
from qcompiler.lower.torch_attention import use_own_attention, widen_angles
from qcompiler.pipeline.trace import plain


def flatten(
    program: torch.export.ExportedProgram, prepared: Prepared, own_attention: bool = True
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program with its arguments as one tuple of tensors and its results as another, and what was edited in it.

    Args:
        own_attention: what the recipe says.

    Raises:
        UnsupportedError: torch cannot export the flat graph.
    """
    module = program.module(check_guards=False)
    tensors = tuple(get_leaf_tensors(arguments(prepared)).values())
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module = torch.fx.GraphModule(module, module.graph)  # without the hook that checks the nested arguments
    for node in list(module.graph.nodes):
        # Flags and numbers were fixed when the module was captured.
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor) and not node.users:
            module.graph.erase_node(node)
    notes = {
        "angles": widen_angles(module.graph) if own_attention else 0,
        "own_attention": plain(use_own_attention(module, tensors, own_attention)),
    }
    module.recompile()
    shapes = tuple(
        dict.fromkeys(prepared.axes.get(path, {}), torch.export.Dim.AUTO)
        for path in get_leaf_tensors(arguments(prepared))
    )
    try:
        return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False), notes
    except Exception as error:
        raise UnsupportedError(
            f"{prepared.description}: torch cannot export the quantized graph: {type(error).__name__}: {error}"
        ) from error


def save(program: torch.export.ExportedProgram, path: Path) -> int:
    """Write the program; returns the bytes of its tensors."""
    program.example_inputs = None  # they are calibration data of no use to a runtime
    torch.export.save(program, path)
    return sum(
        t.numel() * t.element_size()
        for t in [*program.state_dict.values(), *program.constants.values()]
        if isinstance(t, torch.Tensor)
    )
