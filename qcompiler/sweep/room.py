"""What a segment takes on the device where a sweep computes, and whether it has room for it; nothing is asked of a CPU.

    while samples run    values alive of one sample, the weights of one op, statistics of the wave's groups
    while a site is solved    statistics, the solver's arrays
    all the time    quantized products of the segment's sites

Weights that stay from sample to sample take what is left. What lives between segments, solutions and the model stay in memory of
the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from qcompiler.ops.packing import packed_bytes_of
from qcompiler.runtime.device import check_fits, free_bytes
from qcompiler.sweep.order import Order, Stretch
from qcompiler.sweep.sizes import node_bytes

if TYPE_CHECKING:
    from qcompiler.sweep.budget import Costs
    from qcompiler.sweep.sweep import Sweep

# Of the free memory, what the allocator's blocks and the workspaces of the device's libraries may take.
SHARE = 0.9
ADVICE = (
    "give shorter samples (--length), leave these layers to another pass or in float, free memory on the device, or compile with "
    "--device cpu"
)
Parts = dict[str, int]


def alive_bytes(stretch: Stretch, bound: Mapping[Any, int]) -> int:
    """The most bytes of values that are alive at once in a stretch, for one sample and one stream."""
    last: dict[Node, int] = {}
    for position, node in enumerate(stretch.nodes):
        for source in node.all_input_nodes:
            last[source] = position
    keep = set(stretch.outputs)
    dying: dict[int, list[Node]] = {}
    for node, position in last.items():
        if node not in keep and node.op not in ("get_attr", "placeholder"):
            dying.setdefault(position, []).append(node)
    alive = peak = sum(node_bytes(node, bound) for node in stretch.inputs)
    for position, node in enumerate(stretch.nodes):
        alive += node_bytes(node, bound)
        peak = max(peak, alive)
        alive -= sum(node_bytes(dead, bound) for dead in dying.get(position, ()))
    return peak


def constant_bytes(node: Node, bound: Mapping[Any, int]) -> int:
    """Bytes of the constants that a node reads: on a device each is a copy."""
    return sum(node_bytes(source, bound) for source in node.all_input_nodes if source.op == "get_attr")


def segment_parts(sweep: Sweep, stretch: Stretch, costs: Costs) -> Parts:
    """Bytes of a segment on the device by purpose, those of the larger of its two phases."""
    context, bound = sweep.context, sweep.bound
    streams = 2 if sweep.float_stream else 1
    inputs = sum(node_bytes(node, bound) for node in sweep.placeholders)
    products = 0
    for site in (site for site in sweep.graph.sites if site.node in set(stretch.nodes) and site.name in context.schemes):
        products += site.experts * sum(packed_bytes_of(*site.shape, context.schemes[site.name].weight_format).values())
    # A widened copy beside the stored one, while it is made.
    weights = 2 * max((constant_bytes(node, bound) for node in stretch.nodes), default=0)
    running: Parts = {"activations": streams * (alive_bytes(stretch, bound) + inputs), "the weights of one op": weights}
    statistics = max((sum(map(costs.statistics, wave.groups)) for wave in stretch.waves), default=0)
    solver = max((costs.solver(group) for wave in stretch.waves for group in wave.groups), default=0)
    held = sum(costs.segment(site) for wave in stretch.waves for site in wave.sites)
    phase: Parts = max(running, {"the solver": solver}, key=lambda parts: sum(parts.values()))
    return phase | {"statistics": statistics, "quantized layers": products, "what the method keeps": held}


def check_segments(
    device: str, order: Order, cuts: set[int], parts: Callable[[Stretch], Parts], what: str = "solving"
) -> int | None:
    """Cut segments that do not fit the device's free memory, where they can be cut.

    Args:
        device: of the context.
        cuts: of `order`; some may be added.
        parts: bytes of a segment by purpose.
        what: is done with a segment's layers, for the message.

    Returns:
        Bytes that the largest segment leaves free; None where there is no bound.

    Raises:
        CapacityError: a segment that cannot be cut does not fit; names its layers, and says by how much.
    """
    found = free_bytes(torch.device(device))
    if found is None:
        return None
    room = int(found * SHARE)
    size = lambda stretch: sum(parts(stretch).values())  # noqa: E731
    while True:
        worst = max(order.stretches(cuts), key=size)
        if size(worst) <= room:
            return room - size(worst)
        start, end = order.positions[worst.nodes[0]], order.positions[worst.nodes[-1]]
        inside = [cut for cut in order.cuts if cut not in cuts and start < cut <= end]
        if not inside:
            names = [site.name for wave in worst.waves for site in wave.sites] or [worst.nodes[-1].name]
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            check_fits(torch.device(device), parts(worst), f"{what} {listed}", ADVICE, SHARE)
        cuts.add(min(inside, key=lambda cut: order.alive[order.cuts.index(cut)]))


def check_layers(device: str, sizes: Mapping[str, int], what: str) -> None:
    """Compare the largest of layers that are worked on one by one with the device's free memory.

    Args:
        device: of the context.
        sizes: bytes by layer.
        what: is done with them, for the message.

    Raises:
        CapacityError: it does not fit; names it, and says by how much.
    """
    if sizes:
        name = max(sizes, key=lambda name: sizes[name])
        check_fits(torch.device(device), {"its weight and the search": sizes[name]}, f"{what} {name}", ADVICE, SHARE)
