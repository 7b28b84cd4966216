"""What solvers that weigh tokens by the end loss share: E[s x xᵀ] of each group of a layer's rows (GuidedQuant, 2505.07004)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qcompiler.errors import UsageError
from qcompiler.passes.solve.moments import Moments
from qcompiler.sweep.order import Group
from qcompiler.sweep.reducers import GuidedHessians

if TYPE_CHECKING:
    from qcompiler.graph.graph import Site
    from qcompiler.pipeline.context import Context


def check_guides(step: str, sites: Sequence[Site], context: Context) -> None:
    """Refuse a guided pass that no guide was measured for.

    Raises:
        UsageError: names a layer.
    """
    missing = [site.name for site in sites if site.kind == "linear" and site.name not in context.guides]
    if missing:
        raise UsageError(
            f"{step}: guided, but {len(missing)} layers have no weights of their tokens ({missing[0]}); put the pass "
            "guide before it"
        )


def guided_bytes(group: Group, context: Context) -> int:
    """Bytes of `GuidedMoments` of a group."""
    own = sum(context.guides[site.name].shape[1] for site in group.sites if site.name in context.guides)
    return 4 * group.k * group.k * (1 + own)


def fewest_parts(group: Group, context: Context) -> int:
    """Parts of the rows that have an H each, of the group's site with the fewest."""
    return min((context.guides[site.name].shape[1] for site in group.sites if site.name in context.guides), default=1)


class GuidedMoments(Moments):
    """H, and of every site of the group one more for each group of its rows."""

    def __init__(self, group: Group, context: Context):
        super().__init__(group.k, asymmetric=False)
        guides = {site.name: context.guides[site.name] for site in group.sites if site.name in context.guides}
        self._each = {name: GuidedHessians(group.k, guide.shape[1], guide) for name, guide in guides.items()}

    def update(self, *x: torch.Tensor) -> None:
        super().update(*x)
        for reducer in self._each.values():
            reducer.update(x[0])

    def of(self, site: str) -> torch.Tensor:
        """`[row groups, k, k]`, the rows split as by `tensor_split`; taken once."""
        return torch.stack(self._each.pop(site).result())
