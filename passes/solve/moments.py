"""What the layerwise solvers know of a group's input."""

from __future__ import annotations

import torch

from qcompiler.sweep.reducers import Cross, Hessian

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
