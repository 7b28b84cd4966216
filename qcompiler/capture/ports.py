"""What each input and output of a captured model means, so that a session can feed it without knowing the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Dimension = int | str

_INPUT_ROLES = {
    "input_ids": "tokens",
    "decoder_input_ids": "decoder_tokens",
    "position_ids": "positions",
    "cache_position": "positions",
    "attention_mask": "mask",
    "token_type_ids": "token_types",
    "past_length": "past_length",
    "logits_to_keep": "logits_to_keep",
}
_OUTPUT_ROLES = {"logits": "logits", "last_hidden_state": "hidden", "pooler_output": "pooled"}
_CACHE_LEAF = re.compile(r"^(?:past_key_values|cache_params)\.layers\.(\d+)\.(.+)$")
_PAIR = {"keys": "key", "values": "value"}


@dataclass(frozen=True)
class Port:
    """An input or output of a captured model.

    Attributes:
        name: its name in the ONNX graph, e.g. `input_ids` or `input.past_key_values.layers.0.keys`.
        path: where it sits in the model's own arguments or outputs, e.g. `past_key_values.layers.0.keys`.
        role: for an input `tokens`, `decoder_tokens`, `positions`, `mask` (1 for a token that counts), `token_types`,
            `past_key`, `past_value`, `past_state` or `other`; for an output `logits`, `hidden`, `pooled`, `present_key`,
            `present_value`, `present_state` or `other`. A state is any other tensor of the cache: one of fixed shape is
            replaced by every step.
        layer: which cache layer a past or present belongs to, else None.
        shape: a size or a name for each axis. Names: `batch`, `length` (new tokens), `past_length` (tokens in the
            cache), `total_length` (both), `decoder_length` (tokens of an encoder-decoder's second text); anything else is an
            expression of these or a name of its own.
        dtype: `int64`, `float32` …
    """

    name: str
    path: str
    role: str
    layer: int | None
    shape: tuple[Dimension, ...]
    dtype: str


def input_port(name: str, shape: tuple[Dimension, ...], dtype: str) -> Port:
    return _port(name, "input", shape, dtype)


def output_port(name: str, shape: tuple[Dimension, ...], dtype: str) -> Port:
    return _port(name, "output", shape, dtype)


def _port(name: str, side: Literal["input", "output"], shape: tuple[Dimension, ...], dtype: str) -> Port:
    # The exporter tells a cache that goes in from the one that comes out by these prefixes.
    path = name.removeprefix(f"{side}.")
    if cached := _CACHE_LEAF.match(path):
        time = "past" if side == "input" else "present"
        return Port(name, path, f"{time}_{_PAIR.get(cached[2], 'state')}", int(cached[1]), shape, dtype)
    roles = _INPUT_ROLES if side == "input" else _OUTPUT_ROLES
    return Port(name, path, roles.get(path, "other"), None, shape, dtype)
