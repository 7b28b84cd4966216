"""Fit a sweep into a byte budget: where to cut, what to spill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from qcompiler.errors import CapacityError
from qcompiler.graph.graph import Graph, Site
from qcompiler.sweep.order import Group, Order, Stretch, good_cuts
from qcompiler.sweep.room import alive_bytes, check_segments, segment_parts
from qcompiler.sweep.sizes import node_bytes

if TYPE_CHECKING:
    from qcompiler.sweep.sweep import Sweep

# Of the budget, what interpreters, fragmentation and the libraries' own buffers may take.
MARGIN = 0.1


@dataclass(frozen=True)
class Costs:
    """What a method holds beside the engine.

    Attributes:
        statistics: bytes a group while the samples of its wave run; every group of a wave counts.
        solver: bytes while the sites of a group are solved; one group at a time counts.
        segment: bytes a site for as long as its segment is worked on; every site of it counts.
    """

    statistics: Callable[[Group], int] = lambda group: 0
    solver: Callable[[Group], int] = lambda group: 0
    segment: Callable[[Site], int] = lambda site: 0


@dataclass(frozen=True)
class Plan:
    """How the budget is used.

    Attributes:
        segment_bytes: the most that a segment holds.
        spill: whether values across a cut go to a file.
        cache_bytes: room for widened weights kept from sample to sample.
    """

    segment_bytes: int
    spill: bool
    cache_bytes: int


def plan_cuts(sweep: Sweep, costs: Costs) -> tuple[list[int], Plan]:
    """Choose cuts and what to spill.

    Raises:
        CapacityError: even the smallest segments do not fit; says the smallest budget that would do, or how much the device
            lacks.
    """
    found = sweep.order
    cuts = set(good_cuts(found) if sweep.cuts is None else sweep.cuts(found))
    budget = sweep.context.memory
    streams = 2 if sweep.float_stream else 1
    left = check_segments(sweep.context.device, found, cuts, lambda stretch: segment_parts(sweep, stretch, costs))
    most = 2**62 if left is None else left // streams
    if budget is None:
        return sorted(cuts), Plan(0, False, most)
    across = max((streams * len(sweep.samples) * alive for alive in _alive(found, cuts)), default=0)
    limit = int(budget * (1 - MARGIN))
    need = lambda stretch: _need(sweep, stretch, costs)  # noqa: E731
    while True:
        stretches = found.stretches(cuts)
        worst = max(stretches, key=need)
        if need(worst) <= limit:
            break
        inside = [c for c in found.cuts if c not in cuts and _starts(found, worst) < c < _ends(found, worst)]
        if not inside:
            least = max(need(s) for s in found.stretches(found.cuts))
            names = ", ".join(site.name for wave in worst.waves for site in wave.sites[:3])
            raise CapacityError(
                f"a memory budget of {budget:,} bytes is too small: solving {names} alone takes "
                f"{int(need(worst) / (1 - MARGIN)):,}; the smallest budget for this model and recipe is "
                f"{int(least / (1 - MARGIN)) + 1:,} bytes"
            )
        cuts.add(min(inside, key=lambda c: found.alive[found.cuts.index(c)]))
    used = max(need(stretch) for stretch in found.stretches(cuts))
    # Two sets live at once: the segment's inputs and its outputs.
    spill = used + 2 * across > limit
    if spill and sweep.context.scratch is None:
        raise CapacityError(
            f"a memory budget of {budget:,} bytes does not hold the {across:,} bytes that live between segments, and there is "
            "no folder to keep them in; give more memory, or compile to an output directory"
        )
    room = limit - used - (0 if spill else 2 * across)
    return sorted(cuts), Plan(used, spill, min(max(room, 0), most))


def _alive(order: Order, cuts: set[int]) -> list[int]:
    return [alive for cut, alive in zip(order.cuts, order.alive, strict=True) if cut in cuts]


def _starts(order: Order, stretch: Stretch) -> int:
    return order.positions[stretch.nodes[0]]


def _ends(order: Order, stretch: Stretch) -> int:
    return order.positions[stretch.nodes[-1]] + 1


def _need(sweep: Sweep, stretch: Stretch, costs: Costs) -> int:
    """Bytes of a segment: one sample's values at their worst, one widened weight, the method's statistics and solver."""
    peak, widened = alive_bytes(stretch, sweep.bound), 0
    for node in stretch.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                widened = max(widened, copy_bytes(sweep.graph, source, sweep.bound))
    streams = 2 if sweep.float_stream else 1
    packed = sum(site.size * 5 // 4 for wave in stretch.waves for site in wave.sites)
    method = 0
    for wave in stretch.waves:
        statistics = sum(costs.statistics(group) for group in wave.groups)
        method = max(method, statistics + max(costs.solver(group) for group in wave.groups))
    held = sum(costs.segment(site) for wave in stretch.waves for site in wave.sites)
    return streams * peak + widened + packed + method + held


def copy_bytes(graph: Graph, node: Node, bound: Mapping[Any, int]) -> int:
    """Bytes of a copy that reading the constant makes; none where it is used as it is stored."""
    name = str(node.target)
    stored, computed = graph.stored(name), node.meta.get("val")
    same = computed is None or stored.dtype == getattr(computed, "dtype", stored.dtype)
    return 0 if same and name not in graph.scalings else node_bytes(node, bound)
