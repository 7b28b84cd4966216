"""What a model gives: scores over a vocabulary, or other values; and which of its tokens count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompiler.errors import UsageError
from qcompiler.graph.graph import Graph, Site
from qcompiler.sweep.order import ancestors

TOKENS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class Ends:
    """The values that a loss is made of.

    Attributes:
        nodes: the logits alone, or every floating output that is no cache.
        logits: whether the one node is scores over a vocabulary, `[batch, tokens, vocabulary]`.
    """

    nodes: tuple[Node, ...]
    logits: bool


def find_ends(graph: Graph) -> Ends:
    """The graph's logits, where its head makes one score for every row of its token embedding (a decoder: whatever its head
    makes); else its outputs, of a decoder the first: the others are its cache.

    Raises:
        UsageError: no output is a floating tensor.
    """
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    values = [node for node in output.all_input_nodes if node.op == "call_function" and _floating(node)]
    if not values:
        raise UsageError("the model has no floating output that a loss could be made of")
    head = _of_role(graph, "head")
    embed = _of_role(graph, "embed")
    if head is not None and (graph.kind == "decoder" or (embed is not None and embed.shape[0] == head.shape[0])):
        for node in values:
            if node.meta["val"].dim() == 3 and node.meta["val"].shape[-1] == head.shape[0] and head.node in ancestors([node]):
                return Ends((node,), True)
    return Ends(tuple(values[:1] if graph.kind == "decoder" else values), False)


def tokens_that_count(sample: dict[str, Any], batch: int, tokens: int) -> torch.Tensor:
    """Which tokens of a sample are no padding: bool `[batch, tokens]`, from its attention mask where it has one."""
    mask = sample.get(MASK)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        return torch.ones(batch, tokens, dtype=torch.bool)
    return mask[:, mask.shape[1] - tokens :] != 0  # a mask covers the past too


def _of_role(graph: Graph, role: str) -> Site | None:
    return next((site for site in graph.sites if site.role == role), None)


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
