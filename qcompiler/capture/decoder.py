"""Decoder language models: tokens and a cache in, logits and the cache after them out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters.exporter_dynamo import is_cache_object, register_cache_pytrees_for_model
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

from qcompiler.capture.dimensions import ANY_STEP, longest
from qcompiler.capture.export import last_message
from qcompiler.capture.feeds import cache_name, feed
from qcompiler.capture.frequencies import frequencies_change_after
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.states import grow_only, on_copies
from qcompiler.capture.whole import prepare_whole_text
from qcompiler.errors import UnsupportedError

# Shorter than any sliding window, so that every layer's cache has the same length and the tracer sees one symbol; and
# unlike the number of new tokens (2), so that it does not take both for the same one.
_PROMPT_LENGTH = 5
# Relative to the largest logit: two orders of adding the same numbers, not two functions.
_SAME = 1e-3


class NoCache(UnsupportedError):
    """No cache of the model can go in and out of a graph."""


def prepare_decoder(model: PreTrainedModel) -> Prepared:
    """A graph with a cache; where no cache of the model can go in and out of one, a graph of the whole text."""
    try:
        prepared = prepare_cached(model)
    except NoCache as error:
        return prepare_whole_text(model, str(error).removeprefix(f"{model.config.model_type}: "))
    bound = frequencies_change_after(model.config)
    if bound is not None:
        prepared.longest = bound
        prepared.notes.append(
            f"texts of at most {bound} tokens: for longer ones the model takes other rotary frequencies, for keys that are in "
            "the cache already as well"
        )
    return prepared


def prepare_cached(model: PreTrainedModel) -> Prepared:
    """One graph for prefill (empty cache) and decode. The batch is 1, the numbers of new and cached tokens vary.

    A cache of keys and values grows. Beside them, or in their place, a layer may keep a state of fixed shape that every
    step replaces. Where the model can carry such states over one token at a time only, the graph takes one token.

    Raises:
        NoCache: the model has no cache, or one that no graph can carry.
        UnsupportedError: steps with its cache do not compute what the model does.
    """
    description = model.config.model_type
    plain = _has_plain_cache(model, description)
    prepared = _prepared(model, plain, True, description)
    wrong = _differs(model, prepared)
    if wrong is not None and "position_ids" in prepared.inputs:
        # `generate` counts positions from 0; a model that counts from another number does so itself if none are given.
        counting = _without(prepared, "position_ids")
        if _differs(model, counting) is None:
            prepared, wrong = counting, None
    if not _states(prepared):
        if wrong is not None:
            raise UnsupportedError(f"{description}: {wrong}")
        return prepared
    if wrong is None:
        prepared.step, wrong = _longest_step(prepared)
        if wrong is None:
            return prepared
    single = _prepared(model, plain, False, description)
    single.step = 1
    if (still := _differs(model, single)) is not None:
        raise UnsupportedError(f"{description}: {still}")
    single.notes.append(f"one token at a time: {wrong}")
    return single


def _prepared(model: PreTrainedModel, plain: bool, many: bool, description: str) -> Prepared:
    ids = _prompt(model)
    request: dict[str, Any] = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if plain:
        # Plain growing layers: those of a sliding window grow like the others, the mask applies it.
        request["past_key_values"] = DynamicCache()
    with Quiet(), _plain_generation(model):
        try:
            part, inputs = decompose_for_generation(model, request, multi_token_decode=many)["decode"]
            grow_only(inputs)
            with torch.no_grad():
                outputs = part(**copy.deepcopy(inputs))
        except Exception as error:
            message = f"{description}: no step of generation could be run: {last_message(error)}"
            raise NoCache(message) from error
    register_cache_pytrees_for_model(model)
    axes = _axes(inputs, get_leaf_tensors(outputs), description, 2 if many else 1)
    switches = {"use_cache": True, "return_dict": True}
    inputs = {name: value for name, value in inputs.items() if name not in _SWITCHES and value is not None}
    if foreign := [path for path in axes if path in get_leaf_tensors(outputs) and path.split(".")[0] not in _caches(inputs)]:
        raise NoCache(
            f"{description}: keeps {', '.join(foreign[:3])} from step to step outside a cache of transformers; expected "
            "keys and values or states in one cache object"
        )
    shapes = {name: _dynamic(name, value, axes) for name, value in inputs.items()}
    on_copies(part, inputs, {path for path in axes if not axes[path]})
    return Prepared(part, inputs, shapes, "decoder", description, axes, switches)


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    """Tokens without a meaning of their own: models count positions past padding in other ways."""
    config = model.config.get_text_config()
    special = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    tokens = [token for token in range(min(getattr(config, "vocab_size", 64), 64)) if token not in special] or [0]
    return torch.tensor([tokens[at % len(tokens)] for at in range(_PROMPT_LENGTH)])[None]


def _states(prepared: Prepared) -> list[str]:
    """Paths of the cache's tensors whose shape is fixed."""
    return [path for path in get_leaf_tensors(_caches(prepared.inputs)) if not prepared.axes[path]]


def _caches(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if is_cache_object(value)}


def _differs(model: PreTrainedModel, prepared: Prepared) -> str | None:
    """What is wrong with steps from an empty cache on: they must compute what the model computes of a whole text."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    ids = torch.cat([_prompt(model), prepared.inputs["input_ids"]], 1)
    size = prepared.inputs["input_ids"].shape[1]
    try:
        with Quiet(), torch.no_grad():
            expected = model(input_ids=ids, use_cache=False, return_dict=True).logits
            found, cache, past = [], None, 0
            for new in (_PROMPT_LENGTH, size) if size > 1 else (1,) * ids.shape[1]:
                given = feed(prepared, ids[:, past : past + new], past, cache)
                output = prepared.module(**given, **prepared.switches)
                cache, past = output[cache_name(prepared)], past + new
                found.append(output.logits)
    except Exception as error:
        return f"its steps cannot be compared with a whole text: {last_message(error)}"
    difference = (torch.cat(found, 1) - expected).abs().max() / expected.abs().max()
    if difference <= _SAME or not expected.any():
        return None
    return (
        f"steps of {size} tokens with a cache differ by {difference:.2g} of the largest logit from the model on a whole text"
    )


def _without(prepared: Prepared, name: str) -> Prepared:
    kept = {key: value for key, value in prepared.inputs.items() if key != name}
    return replace(
        prepared,
        inputs=kept,
        dynamic_shapes={key: value for key, value in prepared.dynamic_shapes.items() if key in kept},
        axes={path: axes for path, axes in prepared.axes.items() if path != name},
    )


def _longest_step(prepared: Prepared) -> tuple[int | None, str | None]:
    """The most tokens that the graph takes (None for any number), and why several cannot be taken at all."""
    if any(parameter.is_meta for parameter in prepared.module.parameters()):
        return 1, "without weights it cannot be seen whether states are carried over several"
    try:
        step = longest(prepared.export_torch().module(), prepared, ANY_STEP)
    except UnsupportedError as error:
        return 1, str(error)
    if step <= 2:
        return 1, "a loop over the tokens is unrolled when it is traced"
    return (None if step == ANY_STEP else step), None


_CACHES = ("past_key_values.", "cache_params.", "state.", "mems.")
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


def _has_plain_cache(model: PreTrainedModel, description: str) -> bool:
    """Whether every layer keeps keys and values alone."""
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception as error:
        raise NoCache(f"{description}: its cache cannot be built: {last_message(error)}") from error
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _axes(
    inputs: dict[str, Any], outputs: dict[str, torch.Tensor], description: str, new: int
) -> dict[str, dict[int, str]]:
    """Names of the axes that vary. Of a cache it is the one that grew in a step, whatever its layout; none of a state."""
    total = _PROMPT_LENGTH + new
    # Sizes by which a length is known. One token is no axis that varies; the batch, axis 0, is 1 as well.
    names = {2: "length", total: "total_length"} if new > 1 else {total: "total_length"}
    axes: dict[str, dict[int, str]] = {}
    cached = 0
    for path, tensor in get_leaf_tensors(inputs).items():
        after = outputs.get(path)
        if after is not None and after.dim() == tensor.dim():
            grown = [axis for axis in range(tensor.dim()) if after.shape[axis] != tensor.shape[axis]]
            sizes = [(tensor.shape[axis], after.shape[axis]) for axis in grown]
            if sizes not in ([], [(_PROMPT_LENGTH, total)]):
                raise NoCache(
                    f"{description}: {path} goes from {list(tensor.shape)} to {list(after.shape)} in a step; expected one "
                    "axis that grows by the number of new tokens, or none"
                )
            axes[path] = dict.fromkeys(grown, "past_length")
            cached += 1
        else:
            axes[path] = {axis: names[size] for axis, size in enumerate(tensor.shape) if size in names and axis > 0}
    lost = [path for path in outputs if path not in axes and path.startswith(_CACHES)]
    if lost or not cached:
        made = f"found {lost[:3]} without an input" if lost else f"found outputs {sorted(outputs)}"
        raise NoCache(f"{description}: no cache that comes out of a step can go into the next one; {made}")
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
