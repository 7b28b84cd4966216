"""Decoder language models: tokens and a growing cache in, logits and a longer cache out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters.exporter_dynamo import is_cache_object, register_cache_pytrees_for_model
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

from qcompiler.capture.export import last_message
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.errors import UnsupportedError

# Shorter than any sliding window, so that every layer's cache has the same length and the tracer sees one symbol; and
# unlike the number of new tokens (2), so that it does not take both for the same one.
_PROMPT_LENGTH = 5


def prepare_decoder(model: PreTrainedModel) -> Prepared:
    """One graph for prefill (empty cache) and decode. The batch is 1, the numbers of new and cached tokens vary."""
    description = model.config.model_type
    _check_cache(model, description)
    ids = torch.arange(_PROMPT_LENGTH).remainder(model.config.get_text_config().vocab_size)[None]
    # With a cache of plain growing layers: the layers of a sliding window grow like the others, the mask applies it.
    request = dict(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache())
    with Quiet(), _plain_generation(model):
        try:
            part, inputs = decompose_for_generation(model, request, multi_token_decode=True)["decode"]
            with torch.no_grad():
                outputs = part(**copy.deepcopy(inputs))
        except Exception as error:
            message = f"{description}: no step of generation could be run: {last_message(error)}"
            raise UnsupportedError(message) from error
    register_cache_pytrees_for_model(model)
    axes = _axes(inputs, get_leaf_tensors(outputs), description)
    switches = {"use_cache": True, "return_dict": True}
    inputs = {name: value for name, value in inputs.items() if name not in _SWITCHES and value is not None}
    shapes = {name: _dynamic(name, value, axes) for name, value in inputs.items()}
    return Prepared(part, inputs, shapes, "decoder", description, axes, switches)


# Taken out of the arguments by the exporter and set on the configuration instead.
_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "return_loss")


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Greedy, one sequence. `generate` fills what its argument leaves open from the model's own settings, and a
    checkpoint's may ask for beams, sampling or a static cache: they are put aside.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, bos_token_id=0, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own


def _check_cache(model: PreTrainedModel, description: str) -> None:
    """Refuse what keeps a state other than keys and values: convolutions, recurrences."""
    try:
        layers = DynamicCache(config=model.config.get_text_config()).layers
    except Exception as error:
        raise UnsupportedError(f"{description}: its cache cannot be built: {last_message(error)}") from error
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in known})
    if others:
        raise UnsupportedError(
            f"{description}: its cache holds more than keys and values ({', '.join(others)}); "
            "expected attention layers only"
        )


def _axes(inputs: dict[str, Any], outputs: dict[str, torch.Tensor], description: str) -> dict[str, dict[int, str]]:
    """Names of the axes that vary. The cache's is the one that grew in a step, whatever its layout."""
    total = _PROMPT_LENGTH + 2
    axes: dict[str, dict[int, str]] = {}
    cached = 0
    for path, tensor in get_leaf_tensors(inputs).items():
        after = outputs.get(path)
        if after is not None and after.dim() == tensor.dim():
            grown = [axis for axis in range(tensor.dim()) if after.shape[axis] != tensor.shape[axis]]
            if len(grown) != 1 or tensor.shape[grown[0]] != _PROMPT_LENGTH or after.shape[grown[0]] != total:
                raise UnsupportedError(
                    f"{description}: {path} goes from {list(tensor.shape)} to {list(after.shape)} in a step; "
                    "expected one axis that grows by the number of new tokens"
                )
            axes[path] = {grown[0]: "past_length"}
            cached += 1
        else:
            names = {2: "length", total: "total_length"}
            # The batch is axis 0 and its size is 1: never mistaken for either.
            axes[path] = {axis: names[size] for axis, size in enumerate(tensor.shape) if size in names and axis > 0}
    if not cached:
        raise UnsupportedError(f"{description}: no cache comes out of a step; found outputs {sorted(outputs)}")
    return axes


def _dynamic(name: str, value: Any, axes: dict[str, dict[int, str]]) -> Any:
    automatic = torch.export.Dim.AUTO
    if isinstance(value, torch.Tensor):
        return dict.fromkeys(axes[name], automatic)
    if is_cache_object(value):
        paths = get_leaf_tensors({name: value})
        return [dict.fromkeys(axes[path], automatic) for path in paths]
    if isinstance(value, dict):
        return {key: _dynamic(f"{name}.{key}", inner, axes) for key, inner in value.items()}
    return None
