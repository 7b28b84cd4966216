"""What the layerwise solvers know of a group's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qcompiler.sweep.reducers import Cross, Hessian

if TYPE_CHECKING:
    from qcompiler.graph.graph import Site
    from qcompiler.pipeline.context import Context
    from qcompiler.pipeline.passes import Report

ROWS = 1024


class Moments:
    """H of a group; with a float stream also the cross statistic, and the second moments of what the streams differ by."""

    def __init__(self, k: int, asymmetric: bool):
        self._hessian = Hessian(k)
        self._cross = Cross(k) if asymmetric else None
        self._drift = Hessian(k) if asymmetric else None
        self._means: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None

    def update(self, *x: torch.Tensor) -> None:
        self._hessian.update(x[0])
        if self._cross is not None and self._drift is not None:
            self._cross.update(*x)
            self._drift.update(x[1] - x[0])

    @property
    def tokens(self) -> int:
        return self._hessian.tokens

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """H; C = E[(x̃ − x) xᵀ] and E[(x̃ − x)(x̃ − x)ᵀ], x̃ of the float stream."""
        if self._means is None:
            drifted = (None, None) if self._cross is None or self._drift is None else (self._cross.result(), self._drift.result())
            self._means = self._hessian.result(), *drifted
        return self._means


def energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H Wᵀ), some rows at a time."""
    return sum(float(((rows @ hessian) * rows).sum(dtype=torch.float64)) for rows in weight.split(ROWS))


def warn_of_few_tokens(step: str, sites: Sequence[Site], context: Context, report: Report) -> None:
    """With fewer tokens than inputs H has no full rank: some errors cost nothing, and the weights go there."""
    few = {site.name: site.shape[1] for site in sites if report.layers[site.name].get("tokens", 0) < site.shape[1]}
    if few:
        name, k = max(few.items(), key=lambda item: item[1])
        context.reporter.warning(
            f"{step}: {len(few)} layers have more inputs than they met calibration tokens ({name}: {k} inputs, "
            f"{report.layers[name].get('tokens', 0)} tokens): their weights fit the samples more than the text; give more samples"
        )
    report.notes["layers_with_few_tokens"] = list(few)
