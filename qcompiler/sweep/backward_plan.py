"""Fit a backward pass over segments into a byte budget: where to cut, whether what lies between segments goes to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from qcompiler.errors import CapacityError
from qcompiler.sweep.budget import MARGIN, copy_bytes
from qcompiler.sweep.order import Stretch, good_cuts
from qcompiler.sweep.room import Parts, check_segments, constant_bytes
from qcompiler.sweep.sizes import node_bytes

if TYPE_CHECKING:
    from qcompiler.graph.graph import Site
    from qcompiler.sweep.backward import Backward

# Of every computed value while gradients flow: itself, and a gradient or what its op saved beside it.
COPIES = 2
# Of what a loss is made of, besides: log-probabilities, their gradient and its own.
LOSS_COPIES = 3


@dataclass(frozen=True)
class BackwardPlan:
    """How the budget is used.

    Attributes:
        cuts: positions in the order.
        spill: whether values between segments go to a file.
        cache_bytes: room for widened weights kept from sample to sample.
    """

    cuts: list[int]
    spill: bool
    cache_bytes: int


def plan_backward(run: Backward, kept: Callable[[Site], int]) -> BackwardPlan:
    """Choose cuts and what to spill.

    Args:
        run: its graph, order, samples and context.
        kept: bytes a site while its segment is worked on.

    Raises:
        CapacityError: even the smallest segments do not fit, into the budget or the device; says what would do.
    """
    found, budget = run.order, run.context.memory
    cuts = set(good_cuts(found))
    left = check_segments(run.context.device, found, cuts, lambda stretch: _parts(run, stretch), "gradients through")
    most = 2**62 if left is None else left
    if budget is None:
        return BackwardPlan(sorted(cuts), False, most)
    limit = int(budget * (1 - MARGIN))
    need = lambda stretch: _need(run, stretch, kept)  # noqa: E731
    while True:
        worst = max(found.stretches(cuts), key=need)
        if need(worst) <= limit:
            break
        start = found.positions[worst.nodes[0]]
        inside = [cut for cut in found.cuts if cut not in cuts and start < cut <= found.positions[worst.nodes[-1]]]
        if not inside:
            least = max(need(stretch) for stretch in found.stretches(found.cuts))
            names = ", ".join(site.name for wave in worst.waves for site in wave.sites[:3]) or worst.nodes[-1].name
            raise CapacityError(
                f"a memory budget of {budget:,} bytes is too small: gradients through {names} alone take "
                f"{int(need(worst) / (1 - MARGIN)):,}; the smallest budget for this model and these samples is "
                f"{int(least / (1 - MARGIN)) + 1:,} bytes"
            )
        cuts.add(min(inside, key=lambda cut: found.alive[found.cuts.index(cut)]))
    used = max(need(stretch) for stretch in found.stretches(cuts))
    alive = [found.alive[found.cuts.index(cut)] for cut in cuts]
    # The values of every cut, and the gradients of two of them.
    between = len(run.samples) * (sum(alive) + 2 * max(alive, default=0))
    spill = used + between > limit
    if spill and run.context.scratch is None:
        raise CapacityError(
            f"a memory budget of {budget:,} bytes does not hold the {between:,} bytes that live between segments while "
            "gradients are taken, and there is no folder to keep them in; give more memory, or compile to an output directory"
        )
    return BackwardPlan(sorted(cuts), spill, min(max(limit - used - (0 if spill else between), 0), most))


def recorded_bytes(nodes: Iterable[Node], ends: Iterable[Node], bound: dict) -> int:
    """Bytes while gradients flow through nodes for one sample: their values and what autograd has beside them."""
    values = sum(node_bytes(node, bound) for node in nodes if not _is_view(node))
    return COPIES * values + LOSS_COPIES * sum(node_bytes(node, bound) for node in ends)


def _need(run: Backward, stretch: Stretch, kept: Callable[[Site], int]) -> int:
    recorded = recorded_bytes([*stretch.inputs, *stretch.nodes], set(run.ends) & set(stretch.outputs), run.bound)
    constants = {source for node in stretch.nodes for source in node.all_input_nodes if source.op == "get_attr"}
    # Autograd holds every weight that was widened until the segment's gradients are there.
    widened = sum(copy_bytes(run.graph, source, run.bound) for source in constants)
    return recorded + widened + sum(kept(site) for wave in stretch.waves for site in wave.sites)


def _parts(run: Backward, stretch: Stretch) -> Parts:
    """Bytes on the device: autograd holds every constant of the segment, and each is a copy there."""
    recorded = recorded_bytes([*stretch.inputs, *stretch.nodes], set(run.ends) & set(stretch.outputs), run.bound)
    constants = {source for node in stretch.nodes for source in node.all_input_nodes if source.op == "get_attr"}
    largest = max((constant_bytes(node, run.bound) for node in stretch.nodes), default=0)
    weights = sum(node_bytes(source, run.bound) for source in constants)
    return {"activations and gradients": recorded, "weights": weights, "the weights of one op": largest}


def _is_view(node: Node) -> bool:
    """Whether the result shows its argument's own numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = [r.alias_info for r in node.target._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
