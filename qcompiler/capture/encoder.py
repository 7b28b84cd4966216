"""Encoders: tokens and their mask in, hidden states, a pooled vector or class scores out."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from qcompiler.capture.prepared import Prepared

_BATCH, _LENGTH = 2, 11
# By which some are told to keep what they computed, for the text after this one. Exporters know `use_cache` alone.
_KEEPS = ("use_mems",)


def prepare_encoder(model: PreTrainedModel, batch: int = _BATCH, length: int = _LENGTH) -> Prepared:
    """One graph for any batch and any sequence length, traced with these; padding is masked."""
    accepted = inspect.signature(model.forward).parameters
    # Models of characters hash them and have no vocabulary.
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or batch * length
    # Different tokens everywhere, so that no two rows look alike to the tracer; the last tokens of one row are padding.
    ids = torch.arange(batch * length).reshape(batch, length).remainder(vocabulary)
    inputs = {"input_ids": ids}
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][-1, -3:] = 0
    # A vocabulary of one token type (or none) is never fed: tokenizers for such models do not produce the input.
    if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    shapes = {name: dict.fromkeys(names, torch.export.Dim.AUTO) for name, names in axes.items()}
    # A decoder's backbone used as an encoder would return a cache that nobody reads.
    switches = {"use_cache": False, "return_dict": True}
    if kept := [name for name in _KEEPS if name in accepted]:
        model = _without(model, kept)
    return Prepared(model, inputs, shapes, "encoder", model.config.model_type, axes, switches)


def _without(model: PreTrainedModel, switches: list[str]) -> PreTrainedModel:
    """A shallow copy that runs with these switches off."""
    part = copy.copy(model)
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**dict.fromkeys(switches, False), **kwargs})

    part.forward = wrapped
    return part
