"""Encoder-decoders as a whole: a text and the beginning of another in, the logits of the second one out."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from qcompiler.capture.export import last_message
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.unchanged import unchanged
from qcompiler.errors import UnsupportedError

# Unlike each other, so that the tracer does not take both lengths for the same one; see `whole` for why so long.
_LENGTH, _DECODER_LENGTH = 23, 17
# Relative to the largest logit.
_SAME = 1e-3
# What a model gives of the second text: scores with a head, states without.
_RESULTS = ("logits", "last_hidden_state")


def prepare_encoder_decoder(model: PreTrainedModel) -> Prepared:
    """One graph with both texts, batch 1, any two lengths; no cache: a token more computes both texts once more.

    Raises:
        UnsupportedError: the model does not run on two texts of tokens alone, or generates from something else.
    """
    description = model.config.model_type
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 64
    ids = torch.arange(3, 3 + _LENGTH).remainder(vocabulary)[None]
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0  # as a text is filled up: what a mask of ones leaves out would not be traced
    start = start_token(model)
    begin = torch.arange(7, 7 + _DECODER_LENGTH).remainder(vocabulary)[None]
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": begin}
    axes = {name: {1: "decoder_length" if name.startswith("decoder") else "length"} for name in inputs}
    switches = {"use_cache": False, "return_dict": True}
    takes_mask = "decoder_attention_mask" in inspect.signature(model.forward).parameters
    prepared = Prepared(
        module=_result_alone(model, description, masked=takes_mask and _asks_the_tokens(model, inputs | switches)),
        inputs=inputs,
        dynamic_shapes={name: {1: torch.export.Dim.AUTO} for name in inputs},
        kind="encoder-decoder",
        description=description,
        axes=axes,
        switches=switches,
        notes=["encoder and decoder are one graph without a cache: every token that is generated costs both texts once more"],
        start=start,
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        return prepared
    if (wrong := _differs(model, prepared)) is not None:
        raise UnsupportedError(f"{description}: {wrong}")
    return prepared


def start_token(model: PreTrainedModel) -> int | None:
    """What the decoder's text begins with, from generation settings and configuration."""
    for settings in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(settings, name, None)
            if isinstance(found, list) and found:
                found = found[0]
            if isinstance(found, int):
                return found
    return None


class _Reads(TorchDispatchMode):
    """Counts how often a value decides in Python what is computed next."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _asks_the_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether the model looks among the decoder's tokens for padding where it is not told which of them count."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    mask = {"decoder_attention_mask": torch.ones_like(arguments["decoder_input_ids"])}
    counts = []
    for more in ({}, mask):
        with unchanged(model), Quiet(), _Reads() as reads, torch.no_grad():
            try:
                model(**arguments, **more)
            except Exception:  # what is wrong is found out, and said, when the prepared model is run
                return False
        counts.append(reads.count)
    return counts[1] < counts[0]


def _result_alone(model: PreTrainedModel, description: str, masked: bool = False) -> PreTrainedModel:
    """A shallow copy that gives its first result alone: what the encoder made is no output that anybody reads.

    Args:
        masked: tell it that every token of the decoder's text counts, which some find out from the tokens themselves.
    """
    part = copy.copy(model)
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if masked:
            kwargs["decoder_attention_mask"] = torch.ones_like(kwargs["decoder_input_ids"])
        output = forward(*args, **kwargs)
        name = next((name for name in _RESULTS if output.get(name) is not None), None)
        if name is None:
            raise UnsupportedError(f"{description}: gives {', '.join(output)}; expected one of {', '.join(_RESULTS)}")
        return type(output)(**{name: output[name]})

    part.forward = wrapped
    return part


def _differs(model: PreTrainedModel, prepared: Prepared) -> str | None:
    """What is wrong with two texts: the logits after the decoder's start must be those that the model generates from."""
    ids, start = prepared.inputs["input_ids"], prepared.start
    try:
        with Quiet(), torch.no_grad(), unchanged(model):
            begin = torch.full((1, 1), start or 0)
            given = {"input_ids": ids, "attention_mask": prepared.inputs["attention_mask"], "decoder_input_ids": begin}
            found = prepared.module(**given, **prepared.switches)
            if start is None or not model.can_generate() or "logits" not in found:
                return None
            model.generation_config = GenerationConfig(
                do_sample=False, use_cache=False, decoder_start_token_id=start, bos_token_id=start, pad_token_id=0
            )
            del given["decoder_input_ids"]
            generated: Any = cast(Any, model).generate(
                **given, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
            )
    except UnsupportedError:
        raise
    except Exception as error:
        return f"it cannot be run on two texts: {last_message(error)}"
    logits = found.logits
    difference = (logits[:, -1] - generated.logits[0]).abs().max() / logits.abs().max()
    if difference <= _SAME or not logits.any():
        return None
    return f"it generates from more than two texts, whose own logits differ by {difference:.2g} of the largest"
