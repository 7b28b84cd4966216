"""Decide what a model is and make it ready for export."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters.utils import is_multimodal

from qcompiler.capture.decoder import prepare_decoder
from qcompiler.capture.encoder import prepare_encoder
from qcompiler.capture.plain import prepare_module
from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError, UsageError


def prepare(model: torch.nn.Module, example: Any = None, dynamic_shapes: dict[str, Any] | None = None) -> Prepared:
    """Make a model ready for export.

    A decoder language model and an encoder of text need no example. Everything else does: what `forward` is called
    with, as a dict of keyword arguments, a tuple, or one tensor; `dynamic_shapes` then says which axes vary (default:
    axis 0 where the example has at least two rows).
    """
    model = model.eval()
    if example is not None:
        return prepare_module(model, example, dynamic_shapes)
    if dynamic_shapes is not None:
        raise UsageError("dynamic_shapes belongs to example inputs; found none")
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no transformers model: give example inputs to capture it with")
    _check_form(model)
    return prepare_decoder(model) if model.can_generate() else prepare_encoder(model)


def _check_form(model: PreTrainedModel) -> None:
    found = f"{model.config.model_type} ({type(model).__name__})"
    expected = "expected a decoder language model or an encoder of text"
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        raise UnsupportedError(
            f"{found} is an encoder-decoder; {expected}. Its encoder alone can be compiled: pass model.get_encoder()"
        )
    if is_multimodal(model):
        raise UnsupportedError(f"{found} takes more than text; {expected}")
    if "input_ids" not in accepted:
        raise UnsupportedError(
            f"{found} takes {model.main_input_name!r}, not token ids; {expected}, or example inputs to capture it with"
        )
