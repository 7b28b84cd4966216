"""Find sites that read the same value, and sites that share one weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.constants import attribute, storage_key
from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site
from qcompiler.pipeline.passes import Pass, Report

aten = torch.ops.aten

# The rows are the same, in the same order, however the leading axes are written.
_SAME_ROWS = frozenset(
    {
        aten.alias.default, aten.clone.default, aten.contiguous.default, aten.reshape.default, aten.squeeze.dim,
        aten.unsqueeze.default, aten.view.default, aten.flatten.using_ints, aten._unsafe_view.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class FindGroups(Pass):
    """Number what belongs together.

    q(x), k(x), v(x)                          ─▶  one input_group: one set of statistics serves all
    embedding(W, ids) … linear(y, W)          ─▶  one tie_group: quantized once, stored once
    """

    name: ClassVar[str] = "find_groups"
    stage: ClassVar[str] = "analyse"

    def run(self, graph: Graph, context: object) -> Report:
        inputs: dict[tuple[Node, str, object], int] = {}
        keys = {site.name: storage_key(attribute(graph.module, site.weight)) for site in graph.sites}
        shared = Counter(keys.values())
        ties: dict[tuple, int] = {}
        for site in graph.sites:
            # of experts, those whose rows go to the same ones
            expert = args(site.node)[1] if site.kind == "experts" else None
            site.input_group = inputs.setdefault((input_value(site), site.kind, expert), len(inputs))
            key = keys[site.name]
            site.tie_group = ties.setdefault(key, len(ties)) if shared[key] > 1 else None
        return Report(
            matched=len(graph.sites),
            changed=len(graph.sites),
            notes={"input_groups": len(inputs), "tie_groups": len(ties)},
        )


def input_value(site: Site) -> Node:
    """The value that the site reads, whatever shape its leading axes were given on the way."""
    node = args(site.node)[1] if site.kind == "embedding" else args(site.node)[0]
    while node.target in _SAME_ROWS and _last_size(node) == _last_size(args(node)[0]):
        node = args(node)[0]
    return node


def _last_size(node: Node) -> str:
    shape = node.meta["val"].shape
    return str(shape[-1]) if len(shape) else ""
