from __future__ import annotations

import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.passes.analyse.find_groups import FindGroups
from qcompiler.passes.analyse.find_sites import FindSites
from tests.captures import NORMALISE, run


class Mixed(nn.Module):
    """Every kind of product with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.conv = nn.Conv1d(5, 5, 1)
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("angles", torch.randn(8))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.linear(x)) * self.angles
        x = self.twice(x)
        x = torch.bmm(x, self.experts[expert])
        return self.mixing @ self.conv(x)


def mixed_graph():
    graph = capture(Mixed(), {"x": torch.randn(2, 5, 8), "expert": torch.tensor([0, 2])})
    return graph, run(graph, (*NORMALISE, FindSites(), FindGroups()))


def test_linears_are_sites_with_unique_names() -> None:
    graph, reports = mixed_graph()
    assert [(site.name, site.weight, site.bias, site.shape) for site in graph.sites] == [
        ("linear", "linear.weight", "linear.bias", (8, 8)),
        ("twice", "twice.weight", None, (8, 8)),
        ("twice#2", "twice.weight", None, (8, 8)),
    ]
    assert reports["find_sites"].matched == reports["find_sites"].changed == 3


def test_every_other_product_is_a_leftover_with_bytes_and_reason() -> None:
    graph, reports = mixed_graph()
    assert graph.leftovers == {
        "experts": (768, "aten.bmm: a stack of 3 matrices, in a form that is not read as one matrix for each row"),
        "conv.weight": (100, "aten.conv1d: convolutions stay in float"),
        "mixing": (100, "aten.matmul: the weight is not the right factor of a product over the last axis"),
    }
    assert [skip.node for skip in reports["find_sites"].skipped] == ["experts", "conv.weight", "mixing"]


def test_a_module_called_twice_is_one_tie_group_and_two_input_groups() -> None:
    graph, _ = mixed_graph()
    linear, first, second = graph.sites
    assert first.tie_group == second.tie_group is not None and linear.tie_group is None
    assert len({linear.input_group, first.input_group, second.input_group}) == 3


def test_a_view_of_the_input_is_the_same_input() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, 8)
            return self.a(x).reshape(-1, 8) + self.b(flat) + self.c(x.reshape(-1, 4).repeat(1, 2))[: flat.shape[0]]

    graph = capture(Shared(), torch.randn(2, 5, 8))
    run(graph, (*NORMALISE, FindSites(), FindGroups()))
    groups = {site.name: site.input_group for site in graph.sites}
    assert groups["a"] == groups["b"] != groups["c"]


def test_a_graph_without_products_has_no_sites() -> None:
    graph = capture(nn.ReLU(), torch.randn(2, 5))
    reports = run(graph, (FindSites(), FindGroups()))
    assert graph.sites == [] and graph.leftovers == {}
    assert reports["find_sites"].matched == 0 and reports["find_groups"].matched == 0


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.same = nn.Conv1d(5, 5, 3, padding="same")
        self.wider = nn.ConvTranspose3d(5, 5, 1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.wider(self.same(x)[..., None, None])[..., 0, 0]
        h = self.recurrent(x)[0][:, -1]
        return self.bilinear(h, h) + self.bag(ids)


def test_weights_inside_other_ops_are_leftovers_too() -> None:
    graph = capture(Others().eval(), {"x": torch.randn(2, 5, 8), "ids": torch.tensor([[0, 2], [4, 1]])})
    run(graph, (*NORMALISE, FindSites()))
    assert graph.sites == [] and {name: why.partition(": ")[2] for name, (_, why) in graph.leftovers.items()} == {
        "recurrent.weight_ih_l0": "recurrent layers stay in float",
        "recurrent.weight_hh_l0": "recurrent layers stay in float",
        "bilinear.weight": "bilinear forms stay in float",
        "bag.weight": "sums of looked up rows stay in float",
        "same.weight": "convolutions stay in float",
        "wider.weight": "convolutions stay in float",
    }
