"""Call transformers' exporters: our passes inside, silence outside, and one kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import onnx_ir
import torch
from transformers import PreTrainedModel
from transformers.exporters.configs import DynamoConfig, ExportFormat, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.quantizers.base import ExportQuantizer

from qcompiler.capture.dimensions import limit_lengths, name_dimensions
from qcompiler.capture.experts import experts_by_row
from qcompiler.capture.masks import broadcast_masks
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.torch_names import TorchNames
from qcompiler.errors import QCompilerError, UnsupportedError


def export_onnx(prepared: Prepared, quantizer: ExportQuantizer | None) -> onnx_ir.Model:
    with _exporting(prepared, quantizer, "ONNX") as ours:
        config = OnnxConfig(dynamic=True, dynamic_shapes=prepared.dynamic_shapes, quantizer=ours)
        model = OnnxExporter().export(cast(PreTrainedModel, prepared.module), prepared.arguments(), config).program
    name_dimensions(model, prepared.axes, prepared.description)
    return model


def export_torch(
    prepared: Prepared, quantizer: ExportQuantizer | None, *, traced_only: bool = False
) -> torch.export.ExportedProgram:
    """`traced_only`: without a quantizer, leave the stand-ins of weights that stay in their files."""
    with _exporting(prepared, quantizer, "torch.export") as ours:
        ours = None if traced_only else ours
        config = DynamoConfig(dynamic=True, dynamic_shapes=prepared.dynamic_shapes, quantizer=ours)
        return DynamoExporter().export(cast(PreTrainedModel, prepared.module), prepared.arguments(), config).program


class _Loud(ExportQuantizer):
    """The caller's quantizer with the silence lifted, torch as it is, and its own failure kept apart from the exporter's.

    It sees the weights as they are stored, in place of the stand-ins that were traced; without a quantizer they are
    only widened to the type that was traced.
    """

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.ONNX, ExportFormat.DYNAMO)

    def __init__(self, inner: ExportQuantizer | None, quiet: Quiet, names: TorchNames, prepared: Prepared) -> None:
        super().__init__()
        self.inner = inner
        self.quiet, self.names = quiet, names
        self.prepared, self.stored = prepared, prepared.stored
        self.failure: BaseException | None = None

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat) -> Any:
        try:
            limit_lengths(model, self.prepared)
            self.stored.put_back(model, widen=self.inner is None)
            if self.inner is None:
                return model
            with self.quiet.aloud(), self.names.as_they_were():
                return self.inner.quantize(model, sample_inputs, export_format)
        except BaseException as failure:
            self.failure = failure
            raise


@contextlib.contextmanager
def _exporting(prepared: Prepared, quantizer: ExportQuantizer | None, target: str) -> Iterator[_Loud | None]:
    with Quiet() as quiet, experts_by_row(prepared.module), broadcast_masks():
        ours = _Loud(quantizer, quiet, TorchNames(), prepared) if quantizer is not None or prepared.stored else None
        try:
            yield ours
        except QCompilerError:
            raise
        except Exception as error:
            # A bug in a pass must not look like a model that cannot be exported.
            if ours is not None and ours.failure is error:
                raise
            raise UnsupportedError(
                f"{prepared.description}: cannot be exported to {target}: {last_message(error)}"
            ) from error


def last_message(error: BaseException) -> str:
    """The innermost cause's first informative line: exporters wrap one exception in many."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
