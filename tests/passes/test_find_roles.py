"""Roles on small graphs, written with names that say nothing; the real architectures are in tests/capture."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qcompiler.capture.capture import capture
from qcompiler.graph.graph import Graph
from tests.captures import ANALYSE, NORMALISE, run

D = 16


class Parts(nn.Module):
    """Linears `a` … `f` of given widths, and a way to join them."""

    def __init__(self, join, **widths: tuple[int, int]) -> None:
        super().__init__()
        for name, (k, n) in widths.items():
            setattr(self, name, nn.Linear(k, n))
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.join(self, x)


def roles(join, kind: str = "encoder", **widths: tuple[int, int]) -> dict[str, str | None]:
    graph = capture(Parts(join, **widths), torch.randn(2, 5, D))
    graph.kind = kind
    reports = run(graph, NORMALISE + ANALYSE)
    found = {site.name: site.role for site in graph.sites}
    # What has no role is in the report, with the reason.
    skipped = {skip.node for skip in reports["find_roles"].skipped}
    assert skipped == {name for name, role in found.items() if role is None}
    return found


SAME = dict.fromkeys("abcd", (D, D))


def test_an_attention_written_out() -> None:
    def join(m, x):
        scores = (m.b(x) @ m.c(x).mT) / 4.0 + torch.ones(5, 5).tril().log()
        return m.d(scores.softmax(-1) @ m.a(x))

    assert roles(join, **SAME) == {"b": "attn.q", "c": "attn.k", "a": "attn.v", "d": "attn.o"}


def test_an_attention_that_is_whole() -> None:
    def join(m, x):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (m.c, m.a, m.b))
        return m.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert roles(join, **SAME) == {"c": "attn.q", "a": "attn.k", "b": "attn.v", "d": "attn.o"}


def test_one_site_for_all_three() -> None:
    def join(m, x):
        q, k, v = m.a(x).split(D, dim=-1)
        return m.b(F.scaled_dot_product_attention(q, k, v))

    assert roles(join, a=(D, 3 * D), b=(D, D)) == {"a": "attn.qkv", "b": "attn.o"}


def test_keys_that_two_sites_make_have_no_role() -> None:
    def join(m, x):
        key = torch.cat([m.b(x)[..., :8], m.e(x)[..., :8]], -1)
        return m.d(F.scaled_dot_product_attention(m.a(x), key, m.c(x)))

    expected = {"a": None, "b": None, "c": None, "e": None, "d": "attn.o"}
    assert roles(join, **SAME, e=(D, D)) == expected


def test_a_gated_block_whichever_factor_is_the_gate() -> None:
    def join(m, x):
        return m.c(m.a(x) * F.silu(m.b(x)))

    assert roles(join, a=(D, 32), b=(D, 32), c=(32, D)) == {"a": "mlp.up", "b": "mlp.gate", "c": "mlp.down"}


def test_an_activation_written_out_is_an_activation() -> None:
    def join(m, x):
        gate = m.a(x)
        return m.c(gate * torch.sigmoid(1.702 * gate) * m.b(x))

    assert roles(join, a=(D, 32), b=(D, 32), c=(32, D)) == {"a": "mlp.gate", "b": "mlp.up", "c": "mlp.down"}


def test_one_site_for_gate_and_up() -> None:
    def join(m, x):
        up, gate = m.a(x).chunk(2, dim=-1)
        return m.b(up * F.gelu(gate))

    assert roles(join, a=(D, 64), b=(32, D)) == {"a": "mlp.gate_up", "b": "mlp.down"}


def test_a_block_without_a_gate() -> None:
    def join(m, x):
        h = m.a(x)
        return m.b(0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3))))

    assert roles(join, a=(D, 32), b=(32, D)) == {"a": "mlp.up", "b": "mlp.down"}


def test_two_linears_without_an_activation_are_no_block() -> None:
    assert roles(lambda m, x: m.b(m.a(x)), a=(D, 32), b=(32, D)) == {"a": None, "b": None}


def test_a_product_without_an_activation_is_no_gate() -> None:
    def join(m, x):
        return m.c(m.a(x) * m.b(x))

    assert set(roles(join, a=(D, 32), b=(D, 32), c=(32, D)).values()) == {None}


def test_a_router_picks() -> None:
    def join(m, x):
        weights, picked = m.a(x).softmax(-1).topk(2, dim=-1)
        return (weights * picked).sum(-1, keepdim=True) + m.b(x)

    assert roles(join, a=(D, 4), b=(D, D)) == {"a": "router", "b": None}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(40, D), nn.Embedding(3, D), nn.Linear(D, 5)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(ids) + self.b(kinds))


def tagged(kind: str) -> dict[str, str | None]:
    ids = torch.randint(3, (2, 5))
    graph: Graph = capture(Tagger(), {"ids": ids, "kinds": ids})
    graph.kind = kind
    run(graph, NORMALISE + ANALYSE)
    return {site.name: site.role for site in graph.sites}


def test_tokens_are_what_the_larger_table_looks_up_and_scores_come_from_the_head() -> None:
    assert tagged("encoder") == {"a": "embed", "b": None, "c": "head"}


def test_a_plain_module_has_no_head() -> None:
    assert tagged("module")["c"] is None
