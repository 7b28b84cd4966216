"""Decide what a model is and make it ready for export."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters.utils import is_multimodal

from qcompiler.capture.decoder import prepare_decoder
from qcompiler.capture.encoder import prepare_encoder
from qcompiler.capture.encoder_decoder import prepare_encoder_decoder
from qcompiler.capture.fixed import with_fixed_sizes
from qcompiler.capture.left_out import left_out
from qcompiler.capture.plain import prepare_module
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.whole import GeneratesFromMore
from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.pipeline.passes import Skip


def prepare(
    model: torch.nn.Module,
    example: Any = None,
    dynamic_shapes: dict[str, Any] | None = None,
    *,
    text_only: bool = False,
    fixed_length: int | bool = False,
) -> Prepared:
    """Make a model ready for export.

    A decoder language model, an encoder of text and an encoder-decoder of texts need no example. A model that generates from more
    than the text is an encoder, which is a fallback. Everything else does: what
    `forward` is called with, as a dict of keyword arguments, a tuple, or one tensor; `dynamic_shapes` then says which axes
    vary (default: axis 0 where the example has at least two rows). Of a model that takes more than text, the text path alone
    is prepared where `text_only` says so; of a model whose own code holds the length of a text, a graph of `fixed_length`
    tokens (True: of the model's context).
    """
    model = model.eval()
    if example is not None:
        return prepare_module(model, example, dynamic_shapes)
    if dynamic_shapes is not None:
        raise UsageError("dynamic_shapes belongs to example inputs; found none")
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no transformers model: give example inputs to capture it with")
    more = _takes_more(model, text_only)
    prepared = with_fixed_sizes(_of_text(model), model, fixed_length) if fixed_length else _of_text(model)
    if more:
        prepared.left_out = left_out(prepared)
        named = ", ".join(f"{name} ({size:,} bytes)" for name, size in prepared.left_out.items()) or "no weights"
        prepared.notes.append(f"the text path alone; left out: {named}")
    return prepared


def _of_text(model: PreTrainedModel) -> Prepared:
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return prepare_encoder_decoder(model)
    if not model.can_generate():
        return prepare_encoder(model)
    try:
        return prepare_decoder(model)
    except GeneratesFromMore as error:
        return _of_its_own_text(model, str(error))


def _of_its_own_text(model: PreTrainedModel, reason: str) -> Prepared:
    """A model that cannot be compiled to generate, as an encoder: what it computes of a text, its scores for every token."""
    prepared = prepare_encoder(model)
    said = f"an encoder in place of a decoder, what the model computes of a text alone: {reason}"
    prepared.notes.append(said)
    prepared.fallbacks.append(Skip("generation", said))
    return prepared


def _takes_more(model: PreTrainedModel, text_only: bool) -> bool:
    """Whether the model takes more than text, where that is allowed.

    Raises `UnsupportedError` where it is not, and for a model that takes no token ids.
    """
    found = f"{model.config.model_type} ({type(model).__name__})"
    expected = "expected a decoder language model, an encoder or an encoder-decoder of text"
    accepted = inspect.signature(model.forward).parameters
    more = is_multimodal(model) and "input_ids" in accepted
    if more and not text_only:
        raise UnsupportedError(
            f"{found} takes more than text; {expected}. Its text path alone can be compiled: ask for it with the recipe's "
            "allow: {text_only: true}"
        )
    if "input_ids" not in accepted:
        raise UnsupportedError(
            f"{found} takes {model.main_input_name!r}, not token ids; {expected}, or example inputs to capture it with"
        )
    return more
