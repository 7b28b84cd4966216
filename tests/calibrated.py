"""A small network with every wiring that calibration meets, captured and analysed, its formats given: `calibrated(recipe)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qcompiler import recipe as recipes
from qcompiler.capture.capture import capture
from qcompiler.graph.graph import Graph
from qcompiler.passes.analyse.assign_formats import AssignFormats
from qcompiler.pipeline.context import Context
from qcompiler.report.progress import Silent
from tests.captures import ANALYSE, NORMALISE, run

WIDTH, HIDDEN = 96, 136


class Block(nn.Module):
    """q, k, v read one value; o reads their result; gate and up read a sum, which goes on beside them; then down."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.sigmoid(self.q(x)) * self.k(x) + self.v(x)
        h = x + self.o(mixed)
        return h + self.down(torch.relu(self.gate(h)) * self.up(h))


def block(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Block().eval()


def batches(count: int = 4, tokens: int = 32, seed: int = 0) -> list[torch.Tensor]:
    """Tokens `[tokens, WIDTH]`; each batch is wider than the one before, and a few channels are not centred."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(tokens, WIDTH, generator=generator) * (1 + index) for index in range(count)]
    for x in found:
        x[:, ::7] += 2
    return found


def calibrated(
    linear: dict[str, Any],
    model: nn.Module | None = None,
    samples: Sequence[torch.Tensor] | None = None,
    **recipe: Any,
) -> tuple[Graph, Context]:
    """The graph after analysis, and a context with the formats of a recipe and with samples."""
    samples = batches() if samples is None else samples
    graph = capture(block() if model is None else model, (samples[0],))
    run(graph, NORMALISE + ANALYSE)
    (name,) = (str(node.target) for node in graph.nodes if node.op == "placeholder")
    context = Context(
        recipes.load({"name": "test", "linear": linear, **recipe}), Silent(), samples=lambda: [{name: x} for x in samples]
    )
    AssignFormats().run(graph, context)
    return graph, context


def inputs_of(model: nn.Module, samples: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every linear layer of the float model reads, by its name: all tokens."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for x in samples:
            model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in found]) for name, found in seen.items()}
