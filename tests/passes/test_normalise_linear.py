from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.graph.constants import attribute
from qcompiler.graph.text import graph_text
from qcompiler.passes.normalise.einsum import contraction
from qcompiler.passes.normalise.normalise_linear import NormaliseLinear
from qcompiler.passes.normalise.strip_guards import StripGuards

aten = torch.ops.aten
K, N = 6, 4


class Product(nn.Module):
    """x times a weight, written in some way."""

    def __init__(self, shape: tuple[int, ...], write: Callable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(1)))
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(x, self.weight, self.bias)


def conv1d(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view(x.size()[:-1] + (N,))


FORMS = {
    "linear": ((N, K), lambda x, w, b: nn.functional.linear(x, w, b)),
    "linear of a cast": ((N, K), lambda x, w, b: nn.functional.linear(x, w.half().float())),
    "linear of rows": ((2 * N, K), lambda x, w, b: nn.functional.linear(x, w[N:], b)),
    "linear of a transpose": ((K, N), lambda x, w, b: nn.functional.linear(x, w.t())),
    "matmul": ((K, N), lambda x, w, b: x @ w),
    "matmul with T": ((N, K), lambda x, w, b: x @ w.T),
    "matmul with mT": ((N, K), lambda x, w, b: x @ w.mT),
    "matmul with permute": ((N, K), lambda x, w, b: x @ w.permute(1, 0)),
    "matmul with transpose": ((N, K), lambda x, w, b: x @ w.transpose(0, 1)),
    "mm": ((K, N), lambda x, w, b: torch.mm(x.flatten(0, 1), w)),
    "addmm": ((K, N), lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w)),
    "addmm between views": ((K, N), conv1d),
    "einsum nk": ((N, K), lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w)),
    "einsum kn": ((K, N), lambda x, w, b: torch.einsum("...k,kn->...n", x, w)),
    "matmul of a slice": ((2, K, N), lambda x, w, b: x @ w[1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_linear_with_its_own_weight(form: str) -> None:
    module = Product(*FORMS[form])
    graph = capture(module, torch.randn(2, 3, K))
    StripGuards().run(graph, None)
    report = NormaliseLinear().run(graph, None)
    linears = [node for node in graph.nodes if node.target is aten.linear.default]
    assert len(linears) == 1 and report.matched == 1 and not report.skipped
    assert report.changed == (form != "linear")
    weight = linears[0].args[1]
    assert weight.op == "get_attr" and weight.target == "weight"
    assert tuple(attribute(graph.module, "weight").shape) == tuple(weight.meta["val"].shape) == (N, K)
    assert tuple(linears[0].meta["val"].shape)[-1] == N
    x = torch.randn(5, 3, K)
    torch.testing.assert_close(graph.module(x=x), module(x))


def test_the_views_around_addmm_go() -> None:
    graph = capture(Product((K, N), conv1d), torch.randn(2, 3, K))
    NormaliseLinear().run(graph, None)
    assert graph_text(graph.module) == (
        "x: float32[s0, 3, 6] = placeholder\n"
        "weight: float32[4, 6] = parameter\n"
        "bias: float32[4] = parameter\n"
        "linear: float32[s0, 3, 4] = aten.linear(x, weight, bias)\n"
        "output = [linear]\n"
    )


def test_the_module_that_was_captured_keeps_its_weights() -> None:
    module = Product((K, N), conv1d)
    before = module.weight.detach().clone()
    NormaliseLinear().run(capture(module, torch.randn(2, 3, K)), None)
    assert torch.equal(module.weight, before)


def test_a_weight_that_others_read_keeps_its_layout_and_gets_a_twin() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(K, K))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + nn.functional.linear(x, self.weight) + (x @ self.weight)

    module = Both()
    graph = capture(module, torch.randn(2, K))
    NormaliseLinear().run(graph, None)
    linears = [str(node.args[1].target) for node in graph.nodes if node.target is aten.linear.default]
    assert linears == ["weight_linear", "weight", "weight_linear"]
    x = torch.randn(3, K)
    torch.testing.assert_close(graph.module(x=x), module(x))


SKIPPED = {
    "addmm with alpha or beta other than 1": ((K, N), lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=2.0)),
    "constant weight is the left factor": ((N, 3), lambda x, w, b: torch.matmul(w, x)),
    "constant weight is used with 3 axes": ((2, K, N), lambda x, w, b: torch.matmul(x, w)),
    "einsum 'bsk,ks->bs' with constant weight is no product over the last axis": (
        (K, 3), lambda x, w, b: torch.einsum("bsk,ks->bs", x, w)
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_is_no_linear_is_skipped_with_the_reason(reason: str) -> None:
    module = Product(*SKIPPED[reason])
    graph = capture(module, {"x": torch.randn(2, 3, K)}, {"x": {}})
    report = NormaliseLinear().run(graph, None)
    assert [skip.reason for skip in report.skipped] == [reason]
    assert (report.matched, report.changed) == (0, 0)
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(graph.module(x=x), module(x))


def test_products_of_computed_values_are_no_concern() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.mT

    report = NormaliseLinear().run(capture(Attention(), torch.randn(2, 3, K)), None)
    assert (report.matched, report.changed, report.skipped) == (0, 0, [])


@pytest.mark.parametrize(
    "equation, transposed",
    [
        ("bsk,nk->bsn", False), ("...k,nk->...n", False), ("bsk,kn->bsn", True), ("bsk, kn -> bsn", True),
        ("bks,nk->bns", None), ("bsk,nk->bnk", None), ("bsk,ks->bs", None), ("bhk,hkn->bhn", None),
        ("bsk,kk->bsk", None), ("bsk,nk", None), ("bsk,nk,n->bsn", None),
    ],
)  # fmt: skip
def test_einsum_equations(equation: str, transposed: bool | None) -> None:
    assert contraction(equation) is transposed
