"""Decide what a model is and make it ready for export."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from qcompiler.capture.decoder import prepare_decoder
from qcompiler.capture.prepared import Prepared


def prepare(
    model: torch.nn.Module, example: Any = None, dynamic_shapes: dict[str, Any] | None = None
) -> Prepared:
    """Make a model ready for export."""
    assert isinstance(model, PreTrainedModel)
    return prepare_decoder(model)
