"""Helpers of the tests of the scaling passes: a small block with grouped heads, its samples, a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.capture.capture import capture
from qcompiler.graph.graph import Graph
from qcompiler.passes.analyse.assign_formats import AssignFormats
from qcompiler.pipeline.context import Context
from qcompiler.recipe.load import parse
from qcompiler.report.progress import Silent
from tests.captures import ANALYSE, NORMALISE, run

D, HEADS, KV, WIDTH, INNER = 32, 4, 2, 8, 48
INT4 = {"bits": 4, "group": 32}
INT8 = {"bits": 8, "activations": "int8-token"}


class Block(nn.Module):
    """Attention with grouped heads and a gated feed-forward part; some channels of every input are outliers."""

    def __init__(self, outlier: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.k, self.v = nn.Linear(D, HEADS * WIDTH), nn.Linear(D, KV * WIDTH), nn.Linear(D, KV * WIDTH)
        self.o = nn.Linear(HEADS * WIDTH, D)
        self.gate, self.up, self.down = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)
        with torch.no_grad():
            for rows in (self.norm1.weight, self.norm2.weight, self.v.weight, self.up.weight):
                rows[[3, 7]] *= outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = (part.unflatten(-1, (KV, WIDTH)).transpose(1, 2) for part in (self.k(y), self.v(y)))
        k, v = (part[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).flatten(1, 2) for part in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def samples(count: int = 4, tokens: int = 24, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(2, tokens, D, generator=generator)} for _ in range(count)]


def prepared(scheme: dict[str, Any], outlier: float = 1.0, **recipe: Any) -> tuple[Graph, Context]:
    """The block's graph and a context in which every linear has that scheme."""
    graph = capture(Block(outlier), samples()[0])
    run(graph, NORMALISE + ANALYSE)
    context = Context(parse({"name": "test", "linear": scheme, **recipe}, "test"), Silent(), samples=samples)
    AssignFormats().run(graph, context)
    return graph, context


def output(graph: Graph) -> torch.Tensor:
    """What the graph computes on a sample that nothing was calibrated on."""
    graph.materialise()
    with torch.no_grad():
        (y,) = torch.utils._pytree.tree_leaves(graph.module(**samples(1, seed=6)[0]))
    return y
