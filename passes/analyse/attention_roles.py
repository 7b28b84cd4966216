"""Which sites feed an attention and which one reads its result."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Site
from qcompiler.passes.analyse.find_groups import input_value
from qcompiler.passes.analyse.walk import (
    ARITHMETIC,
    ATTENTIONS,
    NONLINEAR,
    PARTS,
    PLAIN,
    PRODUCTS,
    SOFTMAXES,
    downstream,
    upstream,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """Where queries, keys and values enter, as candidates in order of preference, and where the result leaves."""

    scores: tuple[tuple[Node, Node], ...]
    value: Node
    result: Node


def attentions(graph: Graph) -> list[Attention]:
    """Every attention of the graph, whole or written out as softmax(q · k) · v."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in ATTENTIONS:
            query, key, value = args(node)[:3]
            found.append(Attention(((query, key),), value, node))
        elif node.target in SOFTMAXES:
            found += _written_out(node)
    return found


def _written_out(softmax: Node) -> list[Attention]:
    products, _ = upstream(softmax.all_input_nodes[:1], _ends_scores)
    scores = tuple(operands for node in products if (operands := _operands(node)) is not None)
    if not scores:
        return []
    for node in downstream(softmax, lambda node: node.target in PLAIN | ARITHMETIC | PARTS | {operator.getitem}):
        operands = _operands(node)
        if operands is not None and softmax in _sources(operands[0]):
            return [Attention(scores, operands[1], node)]
    return []


def _ends_scores(node: Node) -> bool:
    lookups = (aten.linear.default, aten.embedding.default)
    return node.op != "call_function" or node.target in PRODUCTS or node.target in lookups


def _sources(node: Node) -> set[Node]:
    stops, _ = upstream([node], lambda other: other.target in SOFTMAXES or _ends_scores(other))
    return set(stops)


def _operands(node: Node) -> tuple[Node, Node] | None:
    """Both factors of a product of two computed values."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    factors = args(node)[1] if node.target is aten.einsum.default else args(node)
    factors = factors[1:3] if node.target is aten.baddbmm.default else factors[:2]
    return (factors[0], factors[1]) if len(factors) == 2 else None


def attention_roles(graph: Graph, sites: Mapping[Node, Site]) -> dict[str, str]:
    """Site name -> role, for every attention whose sites are unambiguous."""
    roles: dict[str, str] = {}
    for attention in attentions(graph):
        value = _only(attention.value, sites)
        pairs = [(_only(query, sites), _only(key, sites)) for query, key in attention.scores]
        pair = _self_attention(pairs, value)
        if pair is not None and value is not None:
            query, key = pair
            if query is key is value:
                roles[query.name] = "attn.qkv"
            elif len({query.name, key.name, value.name}) == 3:
                roles |= {query.name: "attn.q", key.name: "attn.k", value.name: "attn.v"}
        output = _reader(attention.result, sites)
        if output is not None:
            roles[output.name] = "attn.o"
    return roles


def _only(value: Node, sites: Mapping[Node, Site]) -> Site | None:
    """The one linear site that the value is made by; other attentions' results are not looked through."""
    stops, _ = upstream([value], lambda node: node in sites or node.target in ATTENTIONS or node.target in SOFTMAXES)
    found = [sites[node] for node in stops if node in sites and sites[node].kind == "linear"]
    return found[0] if len(found) == 1 and len([node for node in stops if node not in sites]) == 0 else None


def _self_attention(pairs: list[tuple[Site | None, Site | None]], value: Site | None) -> tuple[Site, Site] | None:
    """The pair of query and key that reads what the value reads; position terms have scores of their own."""
    whole = [(query, key) for query, key in pairs if query is not None and key is not None]
    if value is None:
        return None
    same = [pair for pair in whole if input_value(pair[0]) is input_value(pair[1]) is input_value(value)]
    if same:
        return same[0]
    # Attention to another sequence: keys and values share an input, queries have their own.
    return whole[0] if len(pairs) == 1 and len(whole) == 1 and input_value(whole[0][1]) is input_value(value) else None


def _reader(result: Node, sites: Mapping[Node, Site]) -> Site | None:
    """The one linear site that reads an attention's result, before it is added to anything."""

    def through(node: Node) -> bool:
        if node in sites or node.op != "call_function":
            return False
        sums = (aten.add.Tensor, aten.add_.Tensor)
        return node.target in PLAIN | PARTS | NONLINEAR or (node.target in ARITHMETIC and node.target not in sums)

    found = [sites[node] for node in downstream(result, through) if node in sites and sites[node].kind == "linear"]
    return found[0] if len(found) == 1 else None
