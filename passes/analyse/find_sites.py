"""Find every place where a weight could be quantized, and name what cannot be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.constants import attribute, free_name, has_attribute, rename
from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site, SiteKind
from qcompiler.ops import SPECS
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.passes.analyse.leftovers import find_leftovers
from qcompiler.pipeline.passes import Pass, Report, Skip

aten = torch.ops.aten

# Leaf names under which a rewritten site holds its tensors.
_OURS = sorted({i.name for spec in SPECS.values() for i in spec.inputs} - {"x", "indices", "expert", "bias"})


@dataclass(frozen=True)
class FindSites(Pass):
    """Fill `graph.sites` with every `linear`, `embedding` and `experts_linear` of a constant, and `graph.leftovers` with the
    rest.

    linear(x, W, b)                 ─▶  Site(kind="linear")
    embedding(W, ids)               ─▶  Site(kind="embedding")
    experts_linear(x, i, W, b)      ─▶  Site(kind="experts")
    bmm(x, W) | conv1d(x, W) | …    ─▶  leftovers[W] = (bytes, why)
    """

    name: ClassVar[str] = "find_sites"
    stage: ClassVar[str] = "analyse"

    def run(self, graph: Graph, context: object) -> Report:
        graph.sites = []
        names: set[str] = set()
        for node in graph.module.graph.nodes:
            site = _site(graph, node, names)
            if site is not None:
                graph.sites.append(site)
                names.add(site.name)
        _make_room(graph)
        graph.leftovers = find_leftovers(graph.module, {site.weight for site in graph.sites})
        report = Report(matched=len(graph.sites), changed=len(graph.sites))
        report.skipped = [Skip(name, why) for name, (_, why) in graph.leftovers.items()]
        return report


def _site(graph: Graph, node: Node, names: set[str]) -> Site | None:
    if node.op != "call_function":
        return None
    kind: SiteKind
    if node.target is aten.linear.default:
        kind, (_, weight, bias) = "linear", (*args(node), None)[:3]
    elif node.target is EXPERTS_LINEAR:
        kind, (_, _, weight, bias) = "experts", (*args(node), None)[:4]
    elif node.target is aten.embedding.default:
        kind, weight, bias = "embedding", args(node)[0], None
    else:
        return None
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    *experts, n, k = attribute(graph.module, str(weight.target)).shape
    return Site(
        name=_unique(weight, node, names),
        kind=kind,
        node=node,
        weight=str(weight.target),
        bias=str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None,
        shape=(n, k),
        experts=experts[0] if experts else 1,
    )


def _unique(attr: Node, node: Node, names: set[str]) -> str:
    """The weight's owner; the calling module where several calls read the weight: tied, or one module called twice."""
    weight = str(attr.target)
    owner = weight.rpartition(".")[0] or weight
    stack = node.meta.get("nn_module_stack") or {}
    caller = next(reversed(list(stack.values())), ("", ""))[0]
    readings = [other for other in node.graph.nodes if other.op == "get_attr" and other.target == attr.target]
    shared = sum(len(other.users) for other in readings) > 1
    for name in (caller, owner) if shared else (owner, caller):
        if name and name not in names:
            return name
    number = 2
    while f"{owner}#{number}" in names:
        number += 1
    return f"{owner}#{number}"


def _make_room(graph: Graph) -> None:
    """Move constants from where the rewrite puts a site's tensors, `<site>.codes` and its like.

    A weight of the outermost module has its owner's name itself: `w` becomes `w.weight`.
    """
    module, moved = graph.module, {}
    for site in graph.sites:
        if has_attribute(module, site.name) and isinstance(attribute(module, site.name), torch.Tensor):
            moved[site.name] = f"{site.name}.weight"
            rename(module, site.name, moved[site.name])
        for leaf in _OURS:
            taken = f"{site.name}.{leaf}"
            if has_attribute(module, taken):
                moved[taken] = free_name(module, f"{taken}_float")
                rename(module, taken, moved[taken])
    if not moved:
        return
    module.recompile()
    for site in graph.sites:
        site.weight = moved.get(site.weight, site.weight)
        site.bias = moved.get(site.bias, site.bias) if site.bias else None
