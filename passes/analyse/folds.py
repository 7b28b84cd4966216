"""Where a factor a channel can move from one constant into others without changing what the graph computes.

y = W₂ · p(W₁ · x)   =   (W₂ · diag(s)) · p((diag(1/s) · W₁) · x)      wherever p commutes with diag(s)

    norm       gain, bias /= s       ─▶  every linear that reads it: columns *= s
    v          rows, bias /= s       ─▶  o: columns *= s, one s for all heads that share a value head
    up         rows, bias /= s       ─▶  down, behind act(gate) · up
    fc1        rows, bias /= s       ─▶  fc2, behind a relu
    linear     rows, bias /= s       ─▶  linear

Found by following the scale through the graph (fold_trace.py), from every constant that could be divided to everything that
its channels reach. With a cache of values the cache holds scaled values: one graph makes it and reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site
from qcompiler.graph.text import describe
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.passes.analyse.find_groups import input_value
from qcompiler.passes.analyse.fold_constants import ConstantView, constant_view
from qcompiler.passes.analyse.fold_trace import Reached, Surroundings, Trace
from qcompiler.passes.analyse.walk import ATTENTIONS, PRODUCTS

aten = torch.ops.aten

Kind = Literal["norm-linear", "value-output", "up-down", "relu", "linear-linear"]
SMALLEST = 1e-5  # of s: what is smaller is taken for this


@dataclass(frozen=True, eq=False)
class Divided:
    """A constant that takes 1/s.

    Attributes:
        name: of the constant; axis 0 is scaled.
        channels: int64 `[n]`: which s divides each row or element, −1 for none.
        offset: o where the graph multiplies by o + w: then w becomes (o + w) / s − o.
    """

    name: str
    channels: torch.Tensor
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Multiplied:
    """A weight that takes s on its last axis.

    Attributes:
        name: of the weight.
        site: name of the site, or None for a weight that is no site.
        channels: int64 `[k]`: which s multiplies each column.
    """

    name: str
    site: str | None
    channels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Fold:
    """One place where s can be moved.

    Attributes:
        kind: what it moves through.
        name: of the producer: the site, or the norm's weight.
        channels: length of s.
        divided: what takes 1/s.
        multiplied: what takes s: everything that reads those channels.
    """

    kind: Kind
    name: str
    channels: int
    divided: tuple[Divided, ...]
    multiplied: tuple[Multiplied, ...]

    @property
    def sites(self) -> list[str]:
        return [entry.site for entry in self.multiplied if entry.site is not None]


@dataclass(frozen=True)
class Refusal:
    """A site whose input takes no scale.

    Attributes:
        site: its name.
        producer: constant that was tried, or empty where the search did not get that far.
        reason: what stands in the way.
    """

    site: str
    producer: str
    reason: str


@dataclass(frozen=True)
class _Source:
    """A constant whose channels can be divided: its value in the graph, the parts of it, and what forbids it."""

    name: str
    node: Node
    labels: torch.Tensor
    channels: int
    norm: bool
    vectors: tuple[ConstantView, ...]
    weight: str | None
    problem: str | None


def find_folds(graph: Graph, gated_attention: bool = False) -> tuple[list[Fold], list[Refusal]]:
    """Every fold of the graph, in graph order, and why each remaining linear site has none.

    Args:
        graph: after analysis (`graph.sites`).
        gated_attention: also move scales past a gate on an attention's result, a · g with g computed without a. The algebra
            allows it; off by default because published recipes leave such layers alone.
    """
    around = Surroundings(graph, gated_attention=gated_attention)
    sites = {site.node: site.name for site in graph.sites}
    folds: list[Fold] = []
    refused: dict[str, Refusal] = {}
    for source in _sources(around, sites):
        trace = Trace(around, source.node, source.labels, source.channels)
        if source.problem is not None:
            trace.stop(source.labels, source.problem)
        for group in _groups(trace):
            fold, problem = _fold(source, trace, group, sites)
            if fold is not None:
                folds.append(fold)
                continue
            for reached in group:
                if reached.node in sites:
                    name = sites[reached.node]
                    refused.setdefault(name, Refusal(name, source.name, problem))
    done = {name for fold in folds for name in fold.sites}
    linears = [site for site in graph.sites if site.kind != "embedding" and site.name not in done]
    return folds, [refused.get(s.name) or Refusal(s.name, "", _nearest(around, s)) for s in linears]


def _sources(around: Surroundings, sites: dict[Node, str]) -> list[_Source]:
    found = []
    for node in around.graph.nodes:
        if node.op != "call_function":
            continue
        source = _linear(around, node, sites) if node.target is aten.linear.default else _gain(around, node)
        if source is not None:
            found.append(source)
    return found


def _linear(around: Surroundings, node: Node, sites: dict[Node, str]) -> _Source | None:
    weight, bias = (*args(node), None)[1:3]
    if weight.op != "get_attr":
        return None
    name = str(weight.target)
    channels = around.graph.stored(name).shape[0]
    labels = torch.arange(channels).expand(around.sizes.shape(node))
    vectors, problem = _vectors(around, (bias,))
    return _Source(sites.get(node, name), node, labels, channels, False, vectors, name, around.sharing.problem(name) or problem)


def _gain(around: Surroundings, node: Node) -> _Source | None:
    """A product with one constant a channel: within a norm, or written out behind it."""
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        parts = args(node)[2 : 4 if node.target is aten.layer_norm.default else 3]
    elif node.target is aten.mul.Tensor:
        views = [constant_view(around.graph, factor, around.sizes) for factor in args(node)]
        if [view is None for view in views].count(False) != 1:
            return None
        parts = tuple(factor for factor, view in zip(args(node), views, strict=True) if view is not None)
    else:
        return None
    gain = constant_view(around.graph, parts[0], around.sizes) if parts else None
    # A buffer is no gain but a table, such as the frequencies of positions.
    if gain is None or not isinstance(around.graph.stored(gain.name), torch.nn.Parameter):
        return None
    vectors, problem = _vectors(around, parts)
    return _Source(gain.name, node, gain.elements.expand(around.sizes.shape(node)), gain.count, True, vectors, None, problem)


def _vectors(around: Surroundings, nodes: tuple) -> tuple[tuple[ConstantView, ...], str | None]:
    """The vectors that a producer multiplies by and adds, and why one of them cannot be divided."""
    found: list[ConstantView] = []
    problem = None
    for index, node in enumerate(nodes):
        if node is None:
            continue
        view = constant_view(around.graph, node, around.sizes)
        if view is None or (index and view.offset):
            problem = problem or f"{node} is added to the producer's result and is no plain constant"
            continue
        problem = problem or around.sharing.problem(view.name)
        problem = problem or (None if view.alone else f"{view.name} is read in several places")
        found.append(view)
    return tuple(found), problem


def _groups(trace: Trace) -> list[list[Reached]]:
    """Products that share channels belong together: scaled together or not at all."""
    groups: list[tuple[set[int], list[Reached]]] = []
    for reached in trace.reached:
        labels = set(reached.labels[reached.labels >= 0].tolist())
        joined = [group for group in groups if group[0] & labels]
        groups = [group for group in groups if not group[0] & labels]
        groups.append((labels.union(*(g[0] for g in joined)), [r for g in joined for r in g[1]] + [reached]))
    return [group for _, group in groups]


def _fold(source: _Source, trace: Trace, group: list[Reached], sites: dict[Node, str]) -> tuple[Fold | None, str]:
    labels = torch.unique(torch.cat([reached.labels for reached in group]))
    labels = labels[labels >= 0]
    reasons = [reason for label in labels.tolist() if (reason := trace.stopped[label]) is not None]
    if reasons:
        return None, reasons[0]
    for reached in group:
        if bool((reached.labels < 0).any()):
            count = int((reached.labels >= 0).sum())
            return None, (
                f"{count} of {len(reached.labels)} input channels of {sites.get(reached.node, reached.weight)} come from "
                f"{source.name}, and the others from elsewhere"
            )
    if not any(reached.node in sites for reached in group):
        return None, "no site reads it"
    number = torch.full((source.channels + 1,), -1, dtype=torch.int64)  # the last one answers label −1
    number[labels] = torch.arange(len(labels))
    divided = [Divided(source.weight, number[:-1])] if source.weight is not None else []
    divided += [Divided(view.name, number[torch.arange(view.count)], view.offset) for view in source.vectors]
    divided += [Divided(view.name, number[own]) for view, own in trace.added if bool((number[own] >= 0).any())]
    multiplied = tuple(Multiplied(r.weight, sites.get(r.node), number[r.labels]) for r in group)
    passed = frozenset().union(*(reached.passed for reached in group))
    return Fold(_kind(source, passed), source.name, len(labels), tuple(divided), multiplied), ""


def _kind(source: _Source, passed: frozenset[str]) -> Kind:
    if source.norm:
        return "norm-linear"
    if "attention" in passed:
        return "value-output"
    if "product" in passed:
        return "up-down"
    return "relu" if "relu" in passed else "linear-linear"


def _nearest(around: Surroundings, site: Site) -> str:
    """What stopped the scales that could have come to the site: the nearest to it."""
    if site.node in around.blocked:
        return around.blocked[site.node]
    value = input_value(site)
    queue, seen = [value], {value}
    while queue:
        node = queue.pop(0)
        if node in around.blocked:
            return around.blocked[node]
        if node.target in (aten.linear.default, EXPERTS_LINEAR):
            return f"the rows of {describe(node)} cannot be scaled on their own"
        origins = node.all_input_nodes
        if node.target in ATTENTIONS | PRODUCTS:  # the values, not what weighs them
            origins = [factor for factor in args(node)[:3] if isinstance(factor, Node)][-1:]
        for origin in origins:
            if origin not in seen:
                seen.add(origin)
                queue.append(origin)
    return f"no linear or norm makes its input ({describe(value)})"


def apply_fold(graph: Graph, fold: Fold, s: torch.Tensor) -> None:
    """Divide the producer by `s` and multiply the consumers with it; the graph computes the same.

    Weights of two axes or more get pending factors, vectors new values (in float64, stored in the type the graph reads).
    Folds add up: applied again, with the same or other factors, the graph still computes the same.

    Args:
        graph: the one that the fold was found in.
        fold: of it.
        s: float `[fold.channels]`, positive; below 1e-5 it counts as 1e-5.

    Raises:
        ValueError: factors of another length, or that are not positive and finite.
    """
    if s.shape != (fold.channels,):
        raise ValueError(f"fold at {fold.name}: expected {fold.channels} factors, found a tensor of {list(s.shape)}")
    if not bool(torch.isfinite(s).all()) or not bool((s > 0).all()):
        raise ValueError(f"fold at {fold.name}: factors must be positive and finite, found {s.min():g} … {s.max():g}")
    if bool((s == 1).all()):
        return
    factors = torch.cat([s.double().clamp(min=SMALLEST), torch.ones(1, dtype=torch.float64)])
    for entry in fold.divided:
        f = factors[entry.channels]
        held = graph.stored(entry.name)
        if held.dim() > 1:
            graph.scale_rows(entry.name, 1 / f)
            continue
        old = graph.constant(entry.name)
        # Where s = 1 the number stays as it is, to the bit.
        new = torch.where(f == 1, old.double(), (entry.offset + old.double()) / f - entry.offset)
        graph.set_constant(entry.name, new.to(old.dtype))
    for weight in fold.multiplied:
        graph.scale_columns(weight.name, factors[weight.channels])
