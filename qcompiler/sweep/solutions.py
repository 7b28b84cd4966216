"""Quantized weights by site, on the CPU; in files where there is a folder: a model's solutions need not fit in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from qcompiler.graph.mapped import kept_fields
from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import AffineFormat, VqFormat, parse_weight_format
from qcompiler.sweep.place import CPU, moved

Solution = AffineWeight | VqWeight
_COLUMNS = "columns"  # of a vector-quantized matrix: its indices do not tell


def to_tensors(solution: Solution) -> dict[str, torch.Tensor]:
    """The solution's tensors by name."""
    fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(solution)}
    tensors = {name: value.cpu() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return tensors | ({_COLUMNS: torch.tensor([solution.columns], device=CPU)} if isinstance(solution, VqWeight) else {})


def from_tensors(tensors: dict[str, torch.Tensor], format: str) -> Solution:
    """The inverse, with the label of the format."""
    parsed = parse_weight_format(format)
    if isinstance(parsed, VqFormat):
        own = {name: tensor for name, tensor in tensors.items() if name != _COLUMNS}
        return VqWeight(**own, columns=int(tensors[_COLUMNS]), format=parsed)
    assert isinstance(parsed, AffineFormat)
    return AffineWeight(tensors["codes"], tensors["scales"], tensors.get("zeros"), parsed)


class Solutions(dict[str, Solution]):
    """A dict whose values lie in files of `folder` (when it is set) and are mapped from there."""

    folder: Path | None = None

    def __setitem__(self, site: str, solution: Solution) -> None:
        super().__setitem__(site, kept_fields(moved(solution, CPU), self.folder, site))

    def keep(self, site: str, solution: Solution) -> None:
        """Record a solution as it is: its tensors are mapped already, or another site's."""
        super().__setitem__(site, solution)
