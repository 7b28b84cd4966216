"""Products with the matrix of each row's expert: every form becomes one, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.graph.constants import attribute
from qcompiler.graph.graph import Scaling
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.passes.analyse.find_groups import FindGroups
from qcompiler.passes.analyse.find_sites import FindSites
from qcompiler.passes.normalise.normalise_experts import NormaliseExperts
from qcompiler.passes.normalise.strip_guards import StripGuards
from tests.captures import run

E, N, K = 4, 6, 8


class Experts(nn.Module):
    """One product with `weight` `[E, N, K]` or `[E, K, N]`, in the form that is given."""

    def __init__(self, form: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.stacked = nn.Parameter(torch.randn(shape))
        self.stacked_bias = nn.Parameter(torch.randn(E, N))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return self.form(x, expert, self.stacked, self.stacked_bias)


def grouped(x, expert, w, b):
    """Sorted, counted, multiplied in groups, and put back."""
    ordered, order = torch.sort(expert)
    offsets = torch.cumsum(torch.histc(ordered.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
    y = torch.ops.transformers.grouped_mm_fallback(x[order], w, offsets) + b[ordered]
    return torch.zeros_like(y).index_put((order,), y)


def counted_otherwise(x, expert, w, b):
    """The same with offsets from which no index can be told."""
    ordered, order = torch.sort(expert)
    offsets = (expert[:, None] <= torch.arange(E)).sum(0).to(torch.int32)
    y = torch.ops.transformers.grouped_mm_fallback(x[order], w, offsets) + b[ordered]
    return torch.zeros_like(y).index_put((order,), y)


OUT_IN, IN_OUT = (E, N, K), (E, K, N)
# name -> (form, shape of the weight, whether its bias becomes the node's)
FORMS = {
    "left": (lambda x, i, w, b: torch.bmm(w[i], x.unsqueeze(-1)).squeeze(-1) + b[i], OUT_IN, True),
    "right": (lambda x, i, w, b: torch.bmm(x.unsqueeze(1), w[i]).squeeze(1).add_(b[i]), IN_OUT, True),
    "right_transposed": (lambda x, i, w, b: torch.bmm(x.unsqueeze(1), w[i].transpose(1, 2)).squeeze(1), OUT_IN, False),
    "transposed_first": (lambda x, i, w, b: torch.bmm(x[:, None], w.mT[i])[:, 0] * 2, OUT_IN, False),
    "selected": (lambda x, i, w, b: torch.bmm(w.index_select(0, i), x[:, :, None]).view(-1, N), OUT_IN, False),
    "kept_axis": (lambda x, i, w, b: torch.matmul(x.unsqueeze(1), w[i]).relu(), IN_OUT, False),
    "einsum": (lambda x, i, w, b: torch.einsum("rk,rnk->rn", x, w[i]) + b[i], OUT_IN, True),
    "einsum_transposed": (lambda x, i, w, b: torch.einsum("bd,bdf->bf", x, w[i]), IN_OUT, False),
    "grouped": (grouped, IN_OUT, True),
    "grouped_by_offsets": (counted_otherwise, IN_OUT, False),
    "every_batch": (lambda x, i, w, b: torch.bmm(x.expand(E, -1, -1), w), IN_OUT, False),
    "every_batch_right": (lambda x, i, w, b: torch.bmm(w, x.t().expand(E, -1, -1)), OUT_IN, False),
    "every_batch_einsum": (lambda x, i, w, b: torch.einsum("etk,enk->etn", x.expand(E, -1, -1), w), OUT_IN, False),
}


def example() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(5, K), "expert": torch.tensor([3, 0, 3, 1, 0])}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_node_that_computes_the_same(name: str) -> None:
    form, shape, biased = FORMS[name]
    module = Experts(form, shape)
    graph = capture(module, example())
    report = run(graph, (StripGuards(), NormaliseExperts()))["normalise_experts"]
    assert report.matched == report.changed == 1 and report.skipped == []
    verify(graph, "normalised")
    (node,) = [node for node in graph.nodes if node.target is EXPERTS_LINEAR]
    assert (len(node.args) == 4) == biased, graph_text(graph.module)
    assert not any(word in graph_text(graph.module) for word in ("bmm", "matmul", "einsum", "grouped_mm"))
    for rows in (1, 7):  # other numbers of rows than the traced one
        x, expert = torch.randn(rows, K), torch.randint(0, E, (rows,))
        torch.testing.assert_close(graph.module(x=x, expert=expert), module(x, expert))
    run(graph, (FindSites(), FindGroups()))
    verify(graph, "analysed")
    (site,) = graph.sites
    assert (site.name, site.kind, site.shape, site.experts) == ("stacked", "experts", (N, K), E)
    assert site.bias == ("stacked_bias" if biased else None) and graph.leftovers == {}


def test_a_transposed_weight_is_a_view_and_its_matrices_are_read_one_by_one() -> None:
    module = Experts(FORMS["right"][0], IN_OUT)
    graph = capture(module, example())
    run(graph, (StripGuards(), NormaliseExperts(), FindSites()))
    (site,) = graph.sites
    weight = attribute(graph.module, site.weight)
    assert weight.untyped_storage().data_ptr() == module.stacked.untyped_storage().data_ptr()
    graph.scalings[site.weight] = Scaling(columns=torch.arange(1.0, K + 1))
    for expert, matrix in graph.matrices(site):
        torch.testing.assert_close(matrix, module.stacked[expert].t() * torch.arange(1.0, K + 1))
    assert site.size == E * N * K and site.weight_shape == (E, N, K)


def test_two_products_with_the_same_rows_and_experts_are_one_input_group() -> None:
    def form(x, i, w, b):
        gate, up = torch.bmm(w[i], x[:, :, None])[..., 0], torch.bmm((w * 1.0)[i], x[:, :, None])[..., 0]
        return gate * up + torch.bmm(w[(i + 1) % E], x[:, :, None])[..., 0]

    graph = capture(Experts(form, OUT_IN), example())
    reports = run(graph, (StripGuards(), NormaliseExperts(), FindSites(), FindGroups()))
    first, other = graph.sites  # the second product's weight is computed
    assert reports["normalise_experts"].changed == 2
    assert first.input_group != other.input_group and first.tie_group == other.tie_group is not None


LEFT = {
    "several_rows": (lambda x, i, w, b: torch.bmm(x.expand(5, 5, K), w.mT[i]), "picked for several rows at once"),
    "constants": (lambda x, i, w, b: torch.bmm(w, w.mT).sum() * x, "both factors are constants: stacked"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_its_reason(name: str) -> None:
    form, reason = LEFT[name]
    graph = capture(Experts(form, OUT_IN), example())
    report = run(graph, (StripGuards(), NormaliseExperts(), FindSites()))["normalise_experts"]
    assert report.changed == 0 and graph.sites == []
    assert [reason in skip.reason for skip in report.skipped] == [True]
    assert list(graph.leftovers) == ["stacked"] and graph.leftovers["stacked"][0] == 4 * E * N * K


def test_matrices_picked_by_a_table_of_indices_are_left() -> None:
    form = lambda x, i, w, b: torch.einsum("rk,rtnk->rtn", x, w[i[:, None].expand(-1, 2)])  # noqa: E731
    graph = capture(Experts(form, OUT_IN), example())
    report = run(graph, (StripGuards(), NormaliseExperts(), FindSites()))["normalise_experts"]
    assert (report.matched, graph.sites) == (0, [])
    assert "in a form that is not read as one matrix for each row" in graph.leftovers["stacked"][1]
