"""What the scaling passes share: which folds they take, what flows into them, and the weights that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.errors import UsageError
from qcompiler.passes.analyse.folds import Fold, find_folds
from qcompiler.pipeline.passes import Skip
from qcompiler.sweep import Sweep
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.place import CPU

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep import Group

# Multiplications that one candidate of a search may cost a weight: beyond it, a sample of the rows stands for all.
WORK = 2**33
FEWEST_ROWS = 128


def choose(
    graph: Graph, context: Context, kinds: Sequence[str], refuse: Callable[[Site], str | None]
) -> tuple[list[Fold], list[Skip]]:
    """Folds of these kinds with a site that `refuse` has nothing against; every other linear site with its reason.

    What a layer reads is scaled through one fold: of two that would do (both factors of a gated product), the first.

    Raises:
        UsageError: a site of a fold is quantized already, or its input's range is measured: it would no longer be true.
    """
    folds, refusals = find_folds(graph)
    sites = {site.name: site for site in graph.sites}
    skipped = [Skip(r.site, f"{r.producer}: {r.reason}" if r.producer else r.reason) for r in refusals]
    chosen: list[Fold] = []
    scaled: dict[str, str] = {}
    for fold in folds:
        reasons = {name: refuse(sites[name]) for name in fold.sites}
        if fold.kind not in kinds:
            reasons = dict.fromkeys(fold.sites, f"a fold of kind {fold.kind}, which the recipe leaves out")
        if all(reason is not None for reason in reasons.values()):
            skipped += [Skip(name, str(reason)) for name, reason in reasons.items()]
            continue
        touched = {entry.name for entry in fold.divided} | {entry.name for entry in fold.multiplied}
        for site in graph.sites:
            measured = site.name in context.static_ranges or site.name in context.outliers
            if (site.weight in touched and site.name in context.solutions) or (site.name in fold.sites and measured):
                raise UsageError(
                    f"layer {site.name}: its {'input was measured' if measured else 'weight was quantized'} before "
                    "the pass that scales it; put passes that scale before those that observe and solve"
                )
        if taken := [name for name in fold.sites if name in scaled]:
            skipped.append(Skip(fold.name, f"what {', '.join(taken)} reads is scaled through {scaled[taken[0]]} already"))
            continue
        scaled |= dict.fromkeys(fold.sites, fold.name)
        chosen.append(fold)
    return chosen, skipped


@dataclass(frozen=True)
class Gathered:
    """A fold and what its sites' inputs gave: one accumulator for each different value that they read."""

    fold: Fold
    inputs: dict[str, Any]

    def distinct(self) -> list[tuple[str, Any]]:
        """A site and the accumulator, once for each value."""
        seen: dict[int, tuple[str, Any]] = {}
        for name, statistics in self.inputs.items():
            seen.setdefault(id(statistics), (name, statistics))
        return list(seen.values())


def gather(
    graph: Graph, context: Context, folds: Sequence[Fold], make: Callable[[Group], Any], costs: Costs
) -> Iterator[Gathered]:
    """Run the calibration samples once; yield each fold as soon as all of its sites' inputs were seen.

    Nothing is scaled before the sweep has ended: `apply_fold` what was found then.

    Args:
        make: an accumulator with an `update` for a group.
    """
    sites = {name: fold for fold in folds for name in fold.sites}
    held: dict[str, Any] = {}
    for segment in Sweep(graph, context, [site for site in graph.sites if site.name in sites], costs=costs):
        # Statistics of one wave at a time where memory is bounded; otherwise all in one run.
        bounded = context.memory is not None or context.device != CPU
        waves = [[wave] for wave in segment.waves] if bounded else [list(segment.waves)]
        for batch in waves:
            groups = [group for wave in batch for group in wave.groups]
            made = {group: make(group) for group in groups}
            segment.feed({group.node: statistics.update for group, statistics in made.items()})
            for group, statistics in made.items():
                held |= {site.name: statistics for site in group.sites}
            del made
            for fold in dict.fromkeys(sites[name] for name in held):
                if all(name in held for name in fold.sites):
                    yield Gathered(fold, {name: held.pop(name) for name in fold.sites})


def spread(fold: Fold, values: dict[str, torch.Tensor], reduce: str) -> torch.Tensor:
    """A number a channel of s, from numbers a column: `amax` or `mean` over the columns that share it and over the sites.

    Args:
        values: float `[k]` by site.
        reduce: as in `Tensor.scatter_reduce`.
    """
    by_site = {weight.site: weight for weight in fold.multiplied}
    source = torch.cat([value.double() for value in values.values()])
    index = torch.cat([by_site[name].channels.to(source.device) for name in values])
    return torch.zeros(fold.channels, dtype=torch.float64).scatter_reduce(0, index, source, reduce, include_self=False)


def column_maxima(graph: Graph, site: Site) -> torch.Tensor:
    """max |w| a column over all rows (of all matrices): float32 `[k]`."""
    largest = torch.zeros(site.shape[1], device="cpu")
    for _, weight in graph.matrices(site):
        low, high = torch.aminmax(weight.float(), dim=0)
        largest = torch.maximum(largest, torch.maximum(-low, high))
    return largest


def most_rows(rows: int, per_row: int) -> int:
    """Of so many rows, how many a search looks at; `per_row`: multiplications that a row costs a candidate."""
    return min(rows, max(FEWEST_ROWS, WORK // max(per_row, 1)))


def sample_rows(graph: Graph, site: Site, per_row: int, seed: int) -> tuple[torch.Tensor, float]:
    """The site's weight, float32 `[m, k]`, or a seeded sample of its rows, and how many rows each one stands for.

    Args:
        per_row: multiplications that a row costs a candidate.
    """
    rows = site.shape[0] * site.experts
    limit = most_rows(rows, per_row)
    if rows == limit:
        return torch.cat([weight.float() for _, weight in graph.matrices(site)]), 1.0
    wanted = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")[:limit].sort().values
    parts = []
    for expert, weight in graph.matrices(site):
        own = wanted[(wanted >= expert * site.shape[0]) & (wanted < (expert + 1) * site.shape[0])]
        parts.append(weight[own - expert * site.shape[0]].float())
    return torch.cat(parts), rows / limit
