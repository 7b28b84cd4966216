"""Find what each site is for, from the graph alone."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site
from qcompiler.passes.analyse.attention_roles import attention_roles
from qcompiler.passes.analyse.mlp_roles import mlp_roles
from qcompiler.passes.analyse.walk import ARITHMETIC, NONLINEAR, PARTS, PLAIN, SOFTMAXES, downstream, tensors
from qcompiler.pipeline.passes import Pass, Report, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class FindRoles(Pass):
    """Give each site its role by what its result meets; None where the structure does not say.

    softmax(q(x) · k(x)) · v(x) ─▶ o          attn.q, attn.k, attn.v, attn.o; attn.qkv where one site makes all three
    down(act(gate(x)) * up(x))                mlp.gate, mlp.up, mlp.down; mlp.gate_up where one site makes both
    down(act(up(x)))                          mlp.up, mlp.down
    embedding(W, tokens), logits = head(x)    embed, head
    topk(softmax(router(x)))                  router
    experts_linear(x, i, W)                   expert
    """

    name: ClassVar[str] = "find_roles"
    stage: ClassVar[str] = "analyse"

    def run(self, graph: Graph, context: object) -> Report:
        sites = {site.node: site for site in graph.sites}
        roles = attention_roles(graph.module.graph, sites)
        roles |= _routers(sites, roles)
        roles |= mlp_roles(sites, roles)
        roles |= {site.name: "expert" for site in graph.sites if site.kind == "experts"}
        embed = _embed(graph)
        if embed is not None:
            roles[embed.name] = "embed"
        head = _head(graph, sites, embed, roles)
        if head is not None:
            roles[head.name] = "head"
        report = Report(matched=len(graph.sites))
        for site in graph.sites:
            site.role = roles.get(site.name)
            if site.role is None:
                report.skipped.append(Skip(site.name, "the graph around it fits no role"))
        report.changed = len(roles)
        report.notes["roles"] = dict(sorted(Counter(roles.values()).items()))
        return report


def _routers(sites: dict[Node, Site], taken: dict[str, str]) -> dict[str, str]:
    """Sites whose result picks: it reaches a top-k through nothing but a softmax or arithmetic."""
    passing = PLAIN | ARITHMETIC | SOFTMAXES | NONLINEAR

    def picks(node: Node) -> bool:
        ends = downstream(node, lambda reader: reader.target in passing and reader not in sites)
        return any(end.target is aten.topk.default for end in ends)

    candidates = [(node, site) for node, site in sites.items() if site.kind == "linear" and site.name not in taken]
    return {site.name: "router" for node, site in candidates if picks(node)}


def _embed(graph: Graph) -> Site | None:
    """The lookup that the tokens feed: straight from an input, and of those the one with most rows."""
    fed = [(site, source) for site in graph.sites if (source := _fed_by(site)) is not None]
    named = [site for site, source in fed if source.target == "input_ids"]
    return max(named or [site for site, _ in fed], key=lambda site: site.shape[0], default=None)


def _fed_by(site: Site) -> Node | None:
    """The graph's input whose values a lookup takes, reshaped at most."""
    if site.kind != "embedding":
        return None
    node = args(site.node)[1]
    while node.op == "call_function" and node.target in PLAIN:
        node = args(node)[0]
    return node if node.op == "placeholder" else None


def _head(graph: Graph, sites: dict[Node, Site], embed: Site | None, taken: dict[str, str]) -> Site | None:
    """The last site before an output: as many rows as the vocabulary, else what turns hidden states into scores."""
    if graph.kind == "module":
        return None
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    candidates: list[tuple[Site, bool]] = []
    for value in output.all_input_nodes:
        bent = False
        node: Node | None = value
        while node is not None and node not in sites:
            bent = bent or node.target in NONLINEAR
            node = _before(node)
        if node is not None and sites[node].kind == "linear" and sites[node].name not in taken:
            candidates.append((sites[node], bent))
    if embed is not None:
        for site, _ in candidates:
            if site.shape[0] == embed.shape[0]:
                return site
    # An activation at the end makes a pooled vector, not scores.
    straight = [site for site, bent in candidates if not bent]
    return straight[-1] if straight else None


def _before(node: Node) -> Node | None:
    """The one tensor that a plain op, a scale or an activation is applied to."""
    if node.target not in PLAIN | ARITHMETIC | NONLINEAR | PARTS | {operator.getitem}:
        return None
    sources = tensors(node)
    return sources[0] if len(sources) == 1 else None
