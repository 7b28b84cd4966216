"""Rotary embeddings whose frequencies depend on how long the text is."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def frequencies_change_after(config: PreTrainedConfig) -> int | None:
    """The longest text of the frequencies that a short one has; None where every text has the same.

    A model that takes others for longer texts (LongRoPE, arXiv 2402.13753) turns the keys of the whole text by them; keys in a
    cache were turned before anybody knew how long the text would be.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    bounds = [_bound(parameters, text) for parameters in each if parameters.get("rope_type") == "longrope"]
    return min((bound for bound in bounds if bound is not None), default=None)


def _bound(parameters: dict[str, Any], config: PreTrainedConfig) -> int | None:
    if parameters.get("short_factor") == parameters.get("long_factor"):
        return None
    of_model = getattr(config, "original_max_position_embeddings", None)
    bound = parameters.get("original_max_position_embeddings") or of_model
    positions = getattr(config, "max_position_embeddings", None)
    return bound if bound is not None and (positions is None or positions > bound) else None
