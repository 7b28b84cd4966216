"""Attention over a cache by our op in a torch program, and the angles of a rotary embedding in double precision.

    scaled_dot_product_attention(q, repeat(cat([past, k])), repeat(cat([past, v])), mask)  →  attention(q, cat, cat, mask)
    cos(x)  →  cos(x.double()).float()

What the lowering to ONNX does there (`own_attention`, `angles`), so that both give the same bits. Heads of keys and values that
were copied for their queries are read uncopied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch

from qcompiler.lower.own_attention import Replaced
from qcompiler.ops.attention import ATTENTION, hides_later

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_REPEATS = {aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.clone.default}
_CAUSAL_REASON = "by the mask a row sees positions after its own"


def widen_angles(graph: torch.fx.Graph) -> int:
    """Cosines and sines in double precision, rounded to float32 once: the same number however they are computed."""
    count = 0
    for node in list(graph.nodes):
        if node.target not in (aten.cos.default, aten.sin.default) or _value(node).dtype != torch.float32:
            continue
        with graph.inserting_before(node):
            wide = graph.call_function(aten.to.dtype, (node.args[0], torch.float64))
        with graph.inserting_after(node):
            narrow = graph.call_function(aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)
        node.args = (wide,)
        count += 1
    return count


def use_own_attention(module: torch.fx.GraphModule, tensors: Iterable[torch.Tensor], wanted: bool = True) -> Replaced:
    """Put our op in the place of every attention node that it can stand for; the graph of `module` is changed in place.

    Args:
        module: with flat inputs.
        tensors: an input each, a call whose cache is not empty: masks are looked at.
        wanted: what the recipe says; without, every node is skipped.
    """
    graph, result = module.graph, Replaced()
    found = [node for node in graph.nodes if node.target is _SDPA]
    calls = {node: _call(node) if wanted else "the recipe says own_attention: false" for node in found}
    masks = _values(module, tensors, {call["mask"] for call in calls.values() if not isinstance(call, str)})
    for node, call in calls.items():
        if not isinstance(call, str) and not hides_later(masks[call["mask"]]):
            call = _CAUSAL_REASON
        if isinstance(call, str):
            result.skipped.append({"node": node.name, "reason": call})
            continue
        with graph.inserting_before(node):
            own = graph.call_function(ATTENTION, tuple(call.values()))
        own.meta = dict(node.meta)
        node.replace_all_uses_with(own)
        graph.erase_node(node)
        result.matched["mask"] = result.matched.get("mask", 0) + 1
    graph.eliminate_dead_code()
    graph.lint()
    return result


def _value(node: torch.fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _call(node: torch.fx.Node) -> dict[str, Any] | str:
    """The arguments of our op in order, or why the node stays torch's."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, mask = given["query"], given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal") or mask is None:
        return "no mask says what a row sees"
    shape = _value(q).shape
    if len(shape) != 4 or shape[0] != 1 or _value(q).dtype != torch.float32:
        return f"a query of {_value(q).dtype} {list(shape)}, not of float32 [1, heads, rows, head size]"
    if _value(mask).dim() != 4 or _value(mask).shape[1] not in (1, shape[1]):
        return f"a mask of {list(_value(mask).shape)}"
    key, value = (_cached(given[name], shape[1]) for name in ("key", "value"))
    if key is None or value is None:
        return "keys and values are not past ones and new ones side by side"
    if _value(key).shape[1] != _value(value).shape[1] or _value(key).shape[3] != _value(value).shape[3]:
        return f"keys {list(_value(key).shape)} and values {list(_value(value).shape)} of several shapes"
    scale = given.get("scale")
    # As the kernel computes it where a node says none.
    scale = float(np.float32(1) / np.sqrt(np.float32(int(shape[3])))) if scale is None else scale
    return {"q": q, "k": key, "v": value, "mask": mask, "scale": scale}


def _cached(node: torch.fx.Node, heads: int) -> torch.fx.Node | None:
    """The concatenation of past and new positions that a key or value is, or is copied from head by head."""
    path = [node]
    while path[-1].target in _REPEATS:
        path.append(path[-1].all_input_nodes[0])
    cat = path[-1]
    parts = cat.all_input_nodes
    if cat.target is not aten.cat.default or len(parts) != 2 or parts[0].op != "placeholder":
        return None
    axis = cat.args[1] if len(cat.args) > 1 else 0
    own = _value(cat).shape
    if len(own) != 4 or axis not in (2, -2):
        return None
    if len(path) == 1:
        return cat
    return cat if _is_repeat(path, heads) else None


def _is_repeat(path: list[torch.fx.Node], heads: int) -> bool:
    """Whether a chain of views, from its end to its begin, copies each head for the queries that share it: on an example."""
    own = _value(path[-1]).shape
    if heads % own[1]:
        return False
    example = torch.arange(own[1] * own[3], dtype=torch.float64).reshape(1, own[1], 1, own[3])
    found = example
    for node in reversed(path[:-1]):
        # A size that is known only when the program runs is that of the positions.
        sizes = [1 if isinstance(n, (torch.fx.Node, torch.SymInt)) else n for n in _sizes(node)]
        if node.target is aten.unsqueeze.default:
            found = found.unsqueeze(cast(int, node.args[1]))
        elif node.target is aten.expand.default:
            found = found.expand(sizes)
        elif node.target in (aten.reshape.default, aten.view.default):
            if math.prod(sizes) != found.numel():
                return False
            found = found.reshape(sizes)
    return torch.equal(found, example.repeat_interleave(heads // own[1], 1))


def _sizes(node: torch.fx.Node) -> list[Any]:
    sizes = node.args[1] if len(node.args) > 1 else []
    return list(sizes) if isinstance(sizes, (list, tuple)) else []


def _values(
    module: torch.fx.GraphModule, tensors: Iterable[torch.Tensor], wanted: set[torch.fx.Node]
) -> Mapping[torch.fx.Node, torch.Tensor]:
    """What the nodes `wanted` are in a call; of the graph only what they need is computed."""
    needed, open_ = set(), list(wanted)
    while open_:
        node = open_.pop()
        if node not in needed:
            needed.add(node)
            open_.extend(node.all_input_nodes)
    interpreter = torch.fx.Interpreter(module)
    given = iter(tensors)
    for node in module.graph.nodes:
        value = next(given) if node.op == "placeholder" else None
        if node in needed:
            interpreter.env[node] = value if node.op == "placeholder" else interpreter.run_node(node)
    return {node: interpreter.env[node] for node in wanted}
