"""Weights that are computed of constants are weights like any other."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from qcompiler.capture.capture import capture
from qcompiler.passes.analyse.find_groups import FindGroups
from qcompiler.passes.analyse.find_sites import FindSites
from qcompiler.passes.normalise.evaluate_weights import EvaluateWeights
from qcompiler.passes.normalise.normalise_embedding import NormaliseEmbedding
from qcompiler.passes.normalise.normalise_linear import NormaliseLinear
from tests.captures import run

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
PASSES = (EvaluateWeights(), NormaliseLinear(), NormaliseEmbedding(), FindSites(), FindGroups())


class Computed(nn.Module):
    """A normalised weight that is read twice, a merged adapter, a scaled matrix and a scaled table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.base = nn.Linear(8, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.table = nn.Embedding(5, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.normed(self.normed(x)) + functional.embedding(ids, self.table.weight * 2)
        return functional.linear(x, self.base.weight + 0.5 * self.up @ self.down), x @ (self.down.t() * 3)


def test_each_becomes_one_constant() -> None:
    module, ids = Computed().eval(), torch.tensor([4, 0, 1])
    graph = capture(module, {"x": X, "ids": ids})
    reports = run(graph, PASSES)
    assert (reports["evaluate_weights"].matched, reports["evaluate_weights"].changed) == (5, 5)
    names = [site.name for site in graph.sites]
    assert names[:2] == ["normed", "normed#2"] and len(names) == 5 and graph.leftovers == {}
    first, second = graph.sites[:2]
    assert first.weight == second.weight and first.tie_group == second.tie_group is not None
    torch.testing.assert_close(graph.constant(first.weight), module.normed.weight)
    torch.testing.assert_close(graph.module(x=X, ids=ids), module(X, ids))


class Of(nn.Module):
    def __init__(self, weight) -> None:
        super().__init__()
        self.w, self.weight = nn.Parameter(torch.randn(6, 8)), weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight(self.w, x))


def test_what_depends_on_the_input_or_is_there_already_stays() -> None:
    for weight in (lambda w, x: w * x.mean(), lambda w, x: w.detach(), lambda w, x: w + torch.rand_like(w)):
        graph = capture(Of(weight), X)
        assert EvaluateWeights().run(graph, None).matched == 0


def test_what_is_written_meanwhile_stays() -> None:
    graph = capture(Of(lambda w, x: (w * 2).add_(x.mean())), X)
    assert EvaluateWeights().run(graph, None).matched == 0
