"""Attention over a shared cache, by our op in place of ONNX Runtime's.

    com.microsoft::GroupQueryAttention(…)  →  ai.qcompiler::GroupQueryAttention(…), the same inputs, outputs and attributes

The last edit of the target `onnx`: every pass before it looks for ONNX Runtime's op. Our op's function body is its arithmetic in
standard ops (`attention_body`), so a runtime without the library computes the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.lower.attention_body import attention_body
from qcompiler.lower.edit import insert_before, is_attention
from qcompiler.lower.share_cache import CacheResult
from qcompiler.ops.body_builder import marker
from qcompiler.ops.spec import DOMAIN, OPSET

NAME = "GroupQueryAttention"
INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias",
)  # fmt: skip
# With the defaults of ONNX Runtime's op. A node with an attribute of another name stays as it is, unless it says the default.
ATTRIBUTES: dict[str, int | float] = {
    "num_heads": 0, "kv_num_heads": 0, "scale": 0.0, "do_rotary": 0, "rotary_interleaved": 0, "local_window_size": -1,
}  # fmt: skip
_NEUTRAL: dict[str, int | float] = {"softcap": 0.0, "smooth_softmax": 0, "causal": 1, "qk_output": 0, "sliding_window_cache": 0}


@dataclass
class Replaced:
    """What became of the attention nodes: how many are ours by variant, and every other with its reason."""

    matched: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


def use_own_attention(model: ir.Model, cache: CacheResult, wanted: bool = True) -> Replaced:
    """Put our op in the place of every attention node of `model` that it can stand for; `model` is changed in place.

    Args:
        cache: how the model's cache works; our op is for shared ones.
        wanted: what the recipe says; without, every node is skipped.
    """
    matched: Counter[str] = Counter()
    result = Replaced()
    for node in [node for node in model.graph if is_attention(node)]:
        reason = _obstacle(node, cache) if wanted else "the recipe says own_attention: false"
        if reason is not None:
            result.skipped.append({"node": node.name or "", "reason": reason})
            continue
        matched[_replace(model, node)] += 1
    if matched:
        model.graph.opset_imports.setdefault(DOMAIN, OPSET)
        model.ir_version = max(model.ir_version, 10)
    result.matched = dict(sorted(matched.items()))
    return result


def _obstacle(node: ir.Node, cache: CacheResult) -> str | None:
    """Why the node stays ONNX Runtime's; None where our op computes the same."""
    if cache.kind != "shared":
        return f"the cache is not shared: {cache.reason}"
    for name, attribute in node.attributes.items():
        if name not in ATTRIBUTES and not (name in _NEUTRAL and attribute.value == _NEUTRAL[name]):
            return f"attribute {name} = {attribute.value}"
    for index, value in enumerate(node.inputs):
        if value is not None and index >= len(INPUTS):
            return f"input {index} ({value.name})"
    given = _given(node)
    if missing := {"query", "past_key", "past_value", "seqlens_k", "total_sequence_length"} - given.keys():
        return f"no input {min(missing)}"
    past = given["past_key"]
    if past.dtype != ir.DataType.FLOAT or past.shape is None or len(past.shape) != 4 or past.shape[0] != 1:
        return f"a past of {past.dtype} {past.shape}, not of float32 [1, heads, capacity, head size]"
    outputs = node.outputs
    if len(outputs) > 3 and any(output.uses() or output.is_graph_output() for output in outputs[3:]):
        return "an output beside result and caches"
    return None


def _given(node: ir.Node) -> dict[str, ir.Value]:
    return {name: value for name, value in zip(INPUTS, node.inputs, strict=False) if value is not None}


def _replace(model: ir.Model, node: ir.Node) -> str:
    """Our node in place of `node`; its variant."""
    given = _given(node)
    attributes = ATTRIBUTES | {name: a.value for name, a in node.attributes.items() if name in ATTRIBUTES}
    rotary = bool(attributes["do_rotary"]) and "cos_cache" in given
    interleaved = rotary and bool(attributes["rotary_interleaved"])
    variant = _variant(given, rotary, interleaved)
    count = 1 + max(index for index, value in enumerate(node.inputs) if value is not None)
    own = ir.node(
        NAME, list(node.inputs[:count]), attributes=attributes | {marker(variant): 1}, domain=DOMAIN, overload=variant,
        num_outputs=3, name=node.name, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    insert_before(node, [own])
    for old, new in zip(node.outputs, own.outputs, strict=False):
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.shape, new.type = old.shape, old.type
        old.name, new.name = None, name
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    key = (DOMAIN, NAME, variant)
    if key not in model.functions:
        model.functions[key] = attention_body(NAME, variant, INPUTS, given, ATTRIBUTES, rotary, interleaved)
    return variant


def _variant(given: Collection[str], rotary: bool, interleaved: bool) -> str:
    """Which inputs are given, and what is rotated: for instance `packed-rotary-positions`, `bias`."""
    parts = [] if "key" in given else ["packed"]
    parts += ["rotary"] * rotary + ["interleaved"] * interleaved
    for name, part in (("position_ids", "positions"), ("attention_bias", "bias")):
        parts += [part] if name in given else []
    return "-".join(parts or ["plain"])
