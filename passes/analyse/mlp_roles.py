"""Which sites make up a feed-forward block."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Site
from qcompiler.passes.analyse.find_groups import input_value
from qcompiler.passes.analyse.walk import ARITHMETIC, NONLINEAR, PARTS, PLAIN, tensors, upstream

aten = torch.ops.aten

_ELEMENTWISE = NONLINEAR | ARITHMETIC | PLAIN | PARTS | {operator.getitem}


def mlp_roles(sites: Mapping[Node, Site], taken: Mapping[str, str]) -> dict[str, str]:
    """Site name -> role, found from the last site of each block: the one that goes back to the block's width."""
    roles: dict[str, str] = {}
    for down in sites.values():
        if down.kind == "linear" and down.name not in taken:
            roles |= _block(down, sites, taken)
    return roles


def _block(down: Site, sites: Mapping[Node, Site], taken: Mapping[str, str]) -> dict[str, str]:
    sources, passed = _made_by(args(down.node)[0], sites)
    if sources is None or any(site.name in taken or site.shape[1] != down.shape[0] for site in sources):
        return {}
    nonlinear = any(node.target in NONLINEAR for node in passed)
    if len(sources) == 1 and nonlinear:
        (first,) = sources
        parts = first.shape[0] != down.shape[1] and any(node.target in PARTS for node in passed)
        return {first.name: "mlp.gate_up" if parts else "mlp.up", down.name: "mlp.down"}
    if len(sources) == 2 and nonlinear and input_value(sources[0]) is input_value(sources[1]):
        gate = _gate(passed, sites)
        if gate is None:
            return {}
        up = sources[1] if gate is sources[0] else sources[0]
        return {gate.name: "mlp.gate", up.name: "mlp.up", down.name: "mlp.down"}
    return {}


def _made_by(value: Node, sites: Mapping[Node, Site]) -> tuple[list[Site] | None, list[Node]]:
    """The sites that the value is made of element by element, or None where anything else takes part."""
    stops, passed = upstream([value], lambda node: node in sites or node.target not in _ELEMENTWISE)
    # Constants and sizes may take part: a scale, a bound, a shape.
    others = [node for node in stops if node not in sites and node.op != "get_attr" and _is_tensor(node)]
    found = [sites[node] for node in stops if node in sites]
    if others or not found or any(site.kind != "linear" for site in found):
        return None, passed
    return found, passed


def _gate(passed: list[Node], sites: Mapping[Node, Site]) -> Site | None:
    """Where two sites meet in a product: the one whose factor passed an activation."""
    for node in passed:
        factors = tensors(node)
        if node.target is not aten.mul.Tensor or len(factors) != 2:
            continue
        made = [_made_by(factor, sites) for factor in factors]
        makers = [found[0] for found, _ in made if found is not None and len(found) == 1]
        if len(makers) != 2 or makers[0] is makers[1]:
            continue
        active = [any(step.target in NONLINEAR for step in steps) for _, steps in made]
        if active[0] != active[1]:
            return makers[active.index(True)]
    return None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
