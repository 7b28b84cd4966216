"""Capture a model as one graph, to look at or to run in torch."""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.capture.export import export_torch
from qcompiler.capture.prepare import prepare
from qcompiler.capture.prepared import Prepared
from qcompiler.graph.graph import Graph


def capture(model: torch.nn.Module, example: Any = None, dynamic_shapes: dict[str, Any] | None = None) -> Graph:
    """The graph of `model` as it was traced: ATen ops, nothing decomposed, nothing rewritten yet."""
    return captured(prepare(model, example, dynamic_shapes))


def captured(prepared: Prepared) -> Graph:
    """The graph of what was prepared; weights that stay in their files are in it as they are stored."""
    module = export_torch(prepared, None, traced_only=True).module(check_guards=False)
    prepared.stored.put_back(module)
    return Graph(module=module, kind=prepared.kind, example=prepared.example())
