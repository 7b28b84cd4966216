"""A model made ready for export: the module, the arguments to trace it with, which axes vary."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.capture.stored import StoredWeights
from qcompiler.graph.graph import Kind
from qcompiler.pipeline.passes import Report, Skip

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters.quantizers.base import ExportQuantizer


@dataclass(frozen=True)
class FixedLength:
    """A graph of one length.

    Attributes:
        tokens: how many.
        filler: the token that a shorter text is filled up with, behind its end.
        outputs: of every output that has an axis of the text's length, which axis that is.
        exact: whether filling up changes nothing of what the model computes of the text.
    """

    tokens: int
    filler: int
    outputs: dict[str, int]
    exact: bool


@dataclass
class Prepared:
    """What an exporter needs of a model.

    Attributes:
        module: the model, or the part of it that is exported.
        inputs: keyword arguments to trace it with; a cache is transformers' own cache object.
        dynamic_shapes: for each of them which axes vary, in the form that `torch.export` takes.
        kind: `decoder`, `encoder`, `encoder-decoder` or `module`.
        description: what the model is, for messages: `llama`, or the class of a plain module.
        axes: names of the axes that vary, by input path: `{"input_ids": {0: "batch", 1: "length"}}`.
        switches: arguments that choose what the model returns and are no inputs of the graph, such as `use_cache`.
        notes: what had to be decided on the way, one sentence each.
        step: the most tokens that the graph takes at once; None for any number.
        whole: why a decoder has no cache and computes the whole text for every token; None where it has one.
        causal: whether the logits of a decoder after a token depend on no later one.
        shortest, longest: the texts that a graph without a cache is right for, found when it is exported; None for no bound.
        fixed: the one length that the graph takes; None where it takes more.
        start: the token that the text of an encoder-decoder's decoder begins with, where it is known.
        left_out: modules of a model that its text path does not use, by path, with the bytes of their weights.
        fallbacks: places where capture took a weaker form than the model's own, and why.
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
    whole: str | None = None
    causal: bool = True
    shortest: int = 1
    longest: int | None = None
    fixed: FixedLength | None = None
    start: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    fallbacks: list[Skip] = field(default_factory=list)
    stored: StoredWeights = field(default_factory=StoredWeights)

    def example(self) -> dict[str, Any]:
        """A fresh copy of the inputs: a forward pass writes into the cache that it is given."""
        return copy.deepcopy(self.inputs)

    def arguments(self) -> dict[str, Any]:
        """What the module itself is called with: a fresh copy of the inputs, and the switches."""
        return {**self.example(), **self.switches}

    def report(self) -> Report:
        """What the record of the capture says."""
        fixed = None if self.fixed is None else asdict(self.fixed)
        found = {"notes": self.notes, "whole_text": self.whole, "left_out": self.left_out, "fixed_length": fixed}
        notes = {key: value for key, value in found.items() if value}
        return Report(fallbacks=list(self.fallbacks), notes=notes)

    def export_onnx(self, quantizer: ExportQuantizer | None = None) -> onnx_ir.Model:
        """The model as ONNX, rewritten on the way by `quantizer`; axes carry the names in `axes`."""
        from qcompiler.capture.export import export_onnx

        return export_onnx(self, quantizer)

    def export_torch(self, quantizer: ExportQuantizer | None = None) -> torch.export.ExportedProgram:
        """The model as an exported torch program, rewritten on the way by `quantizer`."""
        from qcompiler.capture.export import export_torch

        return export_torch(self, quantizer)
