"""Quantized weights by site, kept in files where there is a folder for them: a model's solutions need not fit in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from qcompiler.graph.mapped import kept_fields
from qcompiler.numerics.affine import AffineWeight
from qcompiler.ops.formats import AffineFormat


def to_tensors(solution: AffineWeight) -> dict[str, torch.Tensor]:
    """The solution's tensors by name."""
    tensors = {"codes": solution.codes, "scales": solution.scales}
    return tensors if solution.zeros is None else tensors | {"zeros": solution.zeros}


def from_tensors(tensors: dict[str, torch.Tensor], format: str) -> AffineWeight:
    """The inverse, with the label of the format."""
    return AffineWeight(tensors["codes"], tensors["scales"], tensors.get("zeros"), AffineFormat.parse(format))


class Solutions(dict[str, AffineWeight]):
    """A dict whose values lie in files of `folder` (when it is set) and are mapped from there."""

    folder: Path | None = None

    def __setitem__(self, site: str, solution: AffineWeight) -> None:
        super().__setitem__(site, kept_fields(solution, self.folder, site))

    def keep(self, site: str, solution: AffineWeight) -> None:
        """Record a solution as it is: its tensors are mapped already, or another site's."""
        super().__setitem__(site, solution)
