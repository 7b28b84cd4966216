"""Helpers of the tests of folds: graphs in float64, small modules with a refusal in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree
from torch.utils._pytree import tree_map

from qcompiler.capture.capture import capture
from qcompiler.graph.constants import attribute
from qcompiler.graph.graph import Graph
from qcompiler.passes.analyse.folds import Fold, Refusal, apply_fold, find_folds
from tests.captures import ANALYSE, NORMALISE, Stepper, analysed, run

D = 16


def in_double(graph: Graph) -> Graph:
    """A copy that computes in float64 throughout, analysed."""
    module = copy.deepcopy(graph.module).double()
    widen = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = tree_map(widen, node.args), tree_map(widen, node.kwargs)
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, torch.Tensor) and value.dtype is torch.float32:
            node.meta["val"] = value.double()
            if attribute(module, str(node.target)).dtype is torch.float32:  # neither parameter nor buffer: `double` left it
                owner, _, leaf = str(node.target).rpartition(".")
                setattr(module.get_submodule(owner), leaf, attribute(module, str(node.target)).double())
    module.recompile()
    double = Graph(module, graph.kind, graph.example)
    run(double, ANALYSE)
    return double


def of_model(model_type: str) -> Graph:
    return in_double(analysed(model_type).graph)


def outputs(graph: Graph, model_type: str | None = None) -> list[torch.Tensor]:
    """What the graph computes: a decoder's logits of a prompt and of two steps with its own cache, else every output."""
    if graph.kind == "decoder":
        assert model_type is not None
        generator = torch.Generator().manual_seed(0)
        step = Stepper(graph.module, analysed(model_type).prepared)
        return [step(torch.randint(512, (1, length), generator=generator)) for length in (7, 1, 1)]
    example = tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, graph.example)
    with torch.no_grad():
        return [x for x in _pytree.tree_leaves(graph.module(**example)) if torch.is_tensor(x)]


def factors(fold: Fold, seed: int, adversarial: bool = False) -> torch.Tensor:
    """s from 1e-3 to 1e3: log-uniform, or its ends by turns."""
    if adversarial:
        return torch.where(torch.arange(fold.channels) % 2 == 0, 1e-3, 1e3)
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (6 * torch.rand(fold.channels, generator=generator, dtype=torch.float64) - 3)


def apply_all(graph: Graph, folds: list[Fold], adversarial: bool = False) -> None:
    for index, fold in enumerate(folds):
        apply_fold(graph, fold, factors(fold, index, adversarial))
    graph.materialise()


def largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


class Parts(nn.Module):
    """Linears `a` … `f` of given widths (inputs, outputs), a norm and a gain, and a way to join them."""

    def __init__(self, join: Callable[[Any, torch.Tensor], Any], **widths: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (k, n) in widths.items():
            setattr(self, name, nn.Linear(k, n))
        self.norm = nn.LayerNorm(D)
        self.gain, self.shift = nn.Parameter(1 + 0.1 * torch.randn(D)), nn.Parameter(torch.randn(D))
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)
        self.join = join

    def forward(self, x: torch.Tensor) -> Any:
        return self.join(self, x)


def parts(join: Callable[[Any, torch.Tensor], Any], **widths: tuple[int, int]) -> Graph:
    """The graph of such a module, analysed, in float64."""
    graph = capture(Parts(join, **widths), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)))
    run(graph, NORMALISE + ANALYSE)
    return in_double(graph)


def found(join: Callable[[Any, torch.Tensor], Any], **widths: tuple[int, int]) -> tuple[list[Fold], dict[str, Refusal]]:
    """Folds of such a module and its refusals by site. Every fold preserves what the module computes."""
    graph = parts(join, **widths)
    folds, refusals = find_folds(graph)
    before = outputs(graph)
    apply_all(graph, folds)
    assert largest_error(outputs(graph), before) < 1e-9
    return folds, {refusal.site: refusal for refusal in refusals}


def placeholder(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.op == "placeholder" and node.name == name)
