"""Decoder language models without a cache: the whole text in, the logits after every token of it out."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from qcompiler.capture.export import last_message
from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.unchanged import unchanged
from qcompiler.errors import UnsupportedError
from qcompiler.pipeline.passes import Skip

# Long enough for more than one block of those that compress or attend in blocks: a count of one is traced as a case of its own.
_LENGTH = 23
# Relative to the largest logit.
_SAME = 1e-3
# Arguments by which the forward pass of a model takes what it kept of earlier tokens, or is told to keep it.
_CARRIES = ("use_cache", "use_mems", "cache", "past_key_values")


class GeneratesFromMore(UnsupportedError):
    """What a model generates from is not what it computes of the text."""


def prepare_whole_text(model: PreTrainedModel, reason: str) -> Prepared:
    """One graph for a text of any length, batch 1. A token more costs the whole text once more.

    Args:
        reason: what keeps the model's cache out of a graph. Where the model has one, that is a fallback.

    Raises:
        GeneratesFromMore: the model runs on tokens alone, and generates from something else.
        UnsupportedError: the model does not run on tokens alone.
    """
    description = model.config.model_type
    accepted = inspect.signature(model.forward).parameters
    kept = [name for name in _CARRIES if name in accepted]
    why = reason if kept else "the model has no cache"
    switches = {"use_cache": False} if "use_cache" in accepted else {}
    prepared = Prepared(
        module=model,
        inputs={"input_ids": tokens(model)},
        dynamic_shapes={"input_ids": {1: torch.export.Dim.AUTO}},
        kind="decoder",
        description=description,
        axes={"input_ids": {1: "length"}},
        switches={**switches, "return_dict": True},
        notes=[f"no cache ({why}): every token that is generated costs the whole text before it once more"],
        whole=why,
        fallbacks=[Skip("cache", f"the whole text for every token in place of a cache: {why}")] if kept else [],
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        return prepared
    wrong, difference = _differs(model, prepared)
    if wrong is not None:
        raise UnsupportedError(f"{description}: {reason}; without a cache {wrong}")
    if difference > _SAME:
        raise GeneratesFromMore(
            f"it generates from more than the text, whose own logits differ by {difference:.2g} of the largest"
        )
    changed = _looks_ahead(prepared)
    if changed > _SAME:
        prepared.causal = False
        prepared.notes.append(
            f"later tokens change the logits of earlier ones (by {changed:.2g} of the largest): only those after the last token "
            "predict, and the model has no perplexity"
        )
    return prepared


def tokens(model: PreTrainedModel, length: int = _LENGTH) -> torch.Tensor:
    """Different tokens, so that no two look alike to the tracer."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 64
    return torch.arange(3, 3 + length).remainder(vocabulary)[None]


def _differs(model: PreTrainedModel, prepared: Prepared) -> tuple[str | None, float]:
    """What keeps the model from a whole text; and how far the logits after the last token, which must be those that the model
    generates from, are from them, of the largest.
    """
    ids = prepared.inputs["input_ids"]
    settings = GenerationConfig(do_sample=False, use_cache=False, bos_token_id=0, pad_token_id=0)
    try:
        with Quiet(), torch.no_grad(), unchanged(model):
            model.generation_config = settings
            found = model(input_ids=ids, **prepared.switches).logits
            generated: Any = cast(Any, model).generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    except Exception as error:
        return f"it cannot be run on a whole text: {last_message(error)}", 0.0
    if found.dim() != 3 or found.shape[:2] != ids.shape:
        return f"its logits are {list(found.shape)}; expected [1, {_LENGTH}, vocabulary]", 0.0
    if not found.any():
        return None, 0.0
    return None, float((found[:, -1] - generated.logits[0]).abs().max() / found.abs().max())


def _looks_ahead(prepared: Prepared) -> float:
    """How much later tokens change the logits of earlier ones, of the largest."""
    ids = prepared.inputs["input_ids"]
    with Quiet(), torch.no_grad(), unchanged(prepared.module):
        whole, part = (prepared.module(input_ids=given, **prepared.switches).logits for given in (ids, ids[:, : _LENGTH // 2]))
    return float((whole[:, : part.shape[1]] - part).abs().max() / whole.abs().max().clamp_min(1e-30))
