"""In which order a graph's sites can be solved, and where it can be cut.

A site belongs to wave i when the longest chain of sites before it has i members: q, k, v → o → gate, up → down. Nodes are
ordered by wave, so that everything a wave needs stands before it. Between two waves the graph is cut where the fewest bytes
are alive; a cut that keeps far more alive than its neighbours (in the middle of an attention) is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site
from qcompiler.passes.analyse.find_groups import input_value

# A cut stays when it keeps at most this many times the bytes alive that the better of its neighbours does.
WORSE = 1.75


@dataclass(frozen=True, eq=False)
class Group:
    """Sites that read one value, and can share its statistics.

    Attributes:
        node: the value that they read.
        sites: in graph order.
        k: length of its last axis.
        expert: the expert of each row, where the sites have a matrix for each expert; else None.
    """

    node: Node
    sites: tuple[Site, ...]
    k: int
    expert: Node | None = None

    @property
    def experts(self) -> int:
        """Matrices that the rows are shared out among."""
        return self.sites[0].experts

    @property
    def tapped(self) -> Node | tuple[Node, ...]:
        """What `Segment.feed` is to tap for the group's statistics."""
        return self.node if self.expert is None else (self.node, self.expert)


@dataclass(frozen=True, eq=False)
class Wave:
    """Sites none of which depends on another."""

    groups: tuple[Group, ...]

    @property
    def sites(self) -> list[Site]:
        return [site for group in self.groups for site in group.sites]


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes between two cuts.

    Attributes:
        nodes: in the order in which they run.
        waves: the sites to solve in it.
        inputs: values from before that it or something after it needs (inputs of the graph and constants are not listed).
        outputs: values that something after it needs.
        alive_bytes: of `outputs`, for one sample.
    """

    nodes: tuple[Node, ...]
    waves: tuple[Wave, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    alive_bytes: int = 0


@dataclass
class Order:
    """The nodes that lead to the sites, ordered, with every place where they can be cut.

    Attributes:
        nodes: computed nodes in execution order.
        waves: of the sites asked for.
        cuts: one a pair of neighbouring waves: position in `nodes` (everything before it runs first).
        alive: bytes alive at each cut.
    """

    nodes: list[Node]
    waves: list[Wave]
    cuts: list[int]
    alive: list[int]
    positions: dict[Node, int] = field(default_factory=dict)
    last_use: dict[Node, int] = field(default_factory=dict)

    def stretches(self, cuts: Iterable[int]) -> list[Stretch]:
        """The stretches between the given cuts (positions, a subset of `self.cuts`)."""
        edges = [0, *sorted(cuts), len(self.nodes)]
        found = []
        for start, end in zip(edges, edges[1:], strict=False):
            waves = tuple(w for w in self.waves if start <= self.positions[w.sites[0].node] < end)
            found.append(Stretch(tuple(self.nodes[start:end]), waves, self._alive_at(start), self._alive_at(end)))
        return found

    def _alive_at(self, position: int) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes[:position] if self.last_use.get(n, -1) >= position)


def order(graph: Graph, sites: Sequence[Site], size: Callable[[Node], int], ends: Sequence[Node] = ()) -> Order:
    """Order what the sites depend on.

    Args:
        graph: after analysis.
        sites: linear sites to solve.
        size: bytes of a node's value.
        ends: other values that are wanted when everything has run; they stay alive from where they are made.
    """
    targets = {site.node for site in sites}
    needed = ancestors([*targets, *ends])
    everything = [node for node in graph.module.graph.nodes if node in needed]
    level: dict[Node, int] = {}
    for node in everything:
        level[node] = max((level[i] + (i in targets) for i in node.all_input_nodes), default=0)
    # What no site feeds, such as a layer's slice of the mask, is made where it is first read and not at the beginning.
    late = dict(level)
    for node in reversed(everything):
        if node not in targets:
            late[node] = min((late[user] for user in node.users if user in needed), default=level[node])
    computed = [node for node in everything if node.op not in ("placeholder", "get_attr")]
    ranked = [(late[node], index, node) for index, node in enumerate(computed)]
    nodes = [node for _, _, node in sorted(ranked, key=lambda entry: entry[:2])]
    positions = {node: position for position, node in enumerate(nodes)}
    last_use: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        for source in node.all_input_nodes:
            if source in positions:
                last_use[source] = position
    last_use |= {node: len(nodes) for node in ends}
    result = Order(nodes, _waves(sites, level), [], [], positions, last_use)
    _find_cuts(result, size)
    return result


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that they are made of."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _waves(sites: Sequence[Site], level: dict[Node, int]) -> list[Wave]:
    by_level: dict[int, dict[tuple[Node, Node | None], list[Site]]] = {}
    for site in sites:
        expert = args(site.node)[1] if site.kind == "experts" else None
        by_level.setdefault(level[site.node], {}).setdefault((input_value(site), expert), []).append(site)
    return [
        Wave(
            tuple(
                Group(node, tuple(members), members[0].shape[1], expert)
                for (node, expert), members in by_level[rank].items()
            )
        )
        for rank in sorted(by_level)
    ]


def _find_cuts(order: Order, size: Callable[[Node], int]) -> None:
    """Between each two waves the first position with the fewest bytes alive."""
    changes = [0] * (len(order.nodes) + 1)
    for node, position in order.positions.items():
        last = order.last_use.get(node, position)
        bytes_ = size(node)
        changes[position + 1] += bytes_
        if last + 1 <= len(order.nodes):
            # alive at every cut after its making, up to its last reader
            changes[last + 1] -= bytes_
    alive = [0] * (len(order.nodes) + 1)
    for position in range(1, len(order.nodes) + 1):
        alive[position] = alive[position - 1] + changes[position]
    for before, after in zip(order.waves, order.waves[1:], strict=False):
        first = max(order.positions[site.node] for site in before.sites) + 1
        last = min(order.positions[site.node] for site in after.sites)
        best = min(range(first, last + 1), key=lambda position: alive[position])
        order.cuts.append(best)
        order.alive.append(alive[best])


def good_cuts(order: Order, worse: float = WORSE) -> list[int]:
    """The cuts that keep at most `worse` times the bytes alive that the better of their neighbours does."""
    kept = []
    for index, (cut, alive) in enumerate(zip(order.cuts, order.alive, strict=True)):
        beside = order.alive[max(index - 1, 0) : index] + order.alive[index + 1 : index + 2]
        if alive <= worse * min(beside, default=alive):
            kept.append(cut)
    return kept
