"""A model made ready for export: the module, the arguments to trace it with, which axes vary."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.capture.stored import StoredWeights
from qcompiler.graph.graph import Kind

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters.quantizers.base import ExportQuantizer


@dataclass
class Prepared:
    """What an exporter needs of a model.

    Attributes:
        module: the model, or the part of it that is exported.
        inputs: keyword arguments to trace it with; a cache is transformers' own cache object.
        dynamic_shapes: for each of them which axes vary, in the form that `torch.export` takes.
        kind: `decoder`, `encoder` or `module`.
        description: what the model is, for messages: `llama`, or the class of a plain module.
        axes: names of the axes that vary, by input path: `{"input_ids": {0: "batch", 1: "length"}}`.
        switches: arguments that choose what the model returns and are no inputs of the graph, such as `use_cache`.
        notes: what had to be decided on the way, one sentence each.
        step: the most tokens that the graph takes at once; None for any number.
        longest: the longest text that the graph of an encoder is right for, found when it is exported; None for any.
        stored: weights that `module` has stand-ins for; they are put back into what is captured.
    """

    module: torch.nn.Module
    inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    kind: Kind
    description: str
    axes: dict[str, dict[int, str]]
    switches: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    step: int | None = None
    longest: int | None = None
    stored: StoredWeights = field(default_factory=StoredWeights)

    def example(self) -> dict[str, Any]:
        """A fresh copy of the inputs: a forward pass writes into the cache that it is given."""
        return copy.deepcopy(self.inputs)

    def arguments(self) -> dict[str, Any]:
        """What the module itself is called with: a fresh copy of the inputs, and the switches."""
        return {**self.example(), **self.switches}

    def export_onnx(self, quantizer: ExportQuantizer | None = None) -> onnx_ir.Model:
        """The model as ONNX, rewritten on the way by `quantizer`; axes carry the names in `axes`."""
        from qcompiler.capture.export import export_onnx

        return export_onnx(self, quantizer)

    def export_torch(self, quantizer: ExportQuantizer | None = None) -> torch.export.ExportedProgram:
        """The model as an exported torch program, rewritten on the way by `quantizer`."""
        from qcompiler.capture.export import export_torch

        return export_torch(self, quantizer)
