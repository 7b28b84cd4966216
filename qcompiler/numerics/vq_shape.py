"""Vector quantization of any shape: what the literature has, of which `VqFormat` is the part that has a packed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import VqFormat

BITS = {"int8": 8, "int4": 4, "fp16": 16, "svd": 8}


@dataclass(frozen=True)
class VqShape:
    """W = S · C[index], S and C in one of several forms.

    Attributes:
        dim: columns of a vector.
        centroids: entries of a codebook.
        rows, columns: weights that share a codebook, 0 for all. The last block may be short.
        group: columns of a row that share a scale, 0 for the whole row.
        scales: `fp16`; `log4`: powers of two whose exponents are 4 bits between the least and the largest of a stripe of
            groups, all rows of it; `none`: all are 1.
        codebooks: `int8` or `int4` entries with a float16 scale for each codebook; `fp16`; `svd` (one column a vector only):
            sorted codebooks are the product of two factors of half the rank, the left one int8.
        spread: the columns of a vector lie at distance 4, and not side by side.
    """

    dim: int
    centroids: int
    rows: int
    columns: int
    group: int = 0
    scales: Literal["fp16", "log4", "none"] = "fp16"
    codebooks: Literal["int8", "int4", "fp16", "svd"] = "int8"
    spread: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "centroids"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.centroids > 2**16:
            raise ValueError(f"{self.centroids} centroids of {self.dim} columns: no index has more than 16 bits")
        for name in ("rows", "columns", "group"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 (all) or more")
        for name, value in (("a codebook's columns", self.columns), ("group", self.group)):
            if value % self.span:
                raise ValueError(f"{name}, {value}, would cut vectors: expected a multiple of {self.span}")
        if self.columns and self.group and self.columns % self.group:
            raise ValueError(f"a group of {self.group} columns does not divide a codebook's {self.columns} columns")
        if self.scales not in ("fp16", "log4", "none") or self.codebooks not in BITS:
            raise ValueError(f"scales {self.scales!r} and codebooks {self.codebooks!r} are not known; expected scales 'fp16', "
                             f"'log4' or 'none', and codebooks {', '.join(map(repr, BITS))}")  # fmt: skip
        if self.codebooks == "svd" and self.dim > 1:
            raise ValueError(f"codebooks 'svd' are sorted, which vectors of {self.dim} columns are not: dim must be 1")
        if self.scales == "none" and self.group:
            raise ValueError(f"scales 'none' have no groups of {self.group} columns: group must be 0")

    @classmethod
    def of(cls, format: VqFormat) -> VqShape:
        return cls(format.dim, format.centroids, format.block_rows, format.block_columns, format.group)

    def packed(self) -> VqFormat:
        """The format that is exported.

        Raises:
            ValueError: names what has no packed form.
        """
        if self.codebooks != "int8":
            raise ValueError(f"codebooks {self.codebooks!r} have no packed form: expected 'int8'")
        if self.scales == "log4":
            raise ValueError("scales 'log4' have no packed form: expected 'fp16', or 'none', which are stored as ones")
        if not self.spread and self.dim > 1:
            raise ValueError("vectors of columns side by side have no packed form: expected spread, columns at distance 4")
        return VqFormat(self.dim, self.centroids, self.rows, self.columns, self.group)

    @property
    def span(self) -> int:
        """Columns that vectors cover without a gap."""
        return 4 * self.dim if self.spread else self.dim

    def groups(self, k: int) -> int:
        """Scales in a row of k columns."""
        return -(-k // self.group) if self.group else 1

    def blocks(self, n: int, k: int) -> tuple[int, int]:
        """Codebooks of an n x k matrix, down and across."""
        return (-(-n // self.rows) if self.rows else 1), (-(-k // self.columns) if self.columns else 1)

    def vectors(self, k: int) -> int:
        """Indices of a row."""
        return -(-k // self.span) * self.span // self.dim

    def members(self, k: int) -> torch.Tensor:
        """The columns of each vector, int64 `[vectors, dim]`; those from k on are padding."""
        columns = torch.arange(self.vectors(k) * self.dim)
        if not self.spread:
            return columns.view(-1, self.dim)
        return columns.view(-1, self.dim, 4).transpose(1, 2).reshape(-1, self.dim)

    def bits(self, n: int, k: int) -> float:
        """Bits for each of n · k weights: indices, entries, a float16 scale for each codebook that has one, scales."""
        down, across = self.blocks(n, k)
        total = float(n * self.vectors(k) * max(self.centroids - 1, 1).bit_length())
        values = down * across * self.centroids * self.dim
        if self.codebooks == "svd":
            rank = max(1, self.centroids // 2)
            total += down * across * (8 * rank + 16) + 16 * rank * self.centroids
        else:
            total += BITS[self.codebooks] * values + (0 if self.codebooks == "fp16" else 16 * down * across)
        groups = self.groups(k)
        total += {"none": 0, "fp16": 16 * n * groups, "log4": 4 * n * groups + 32 * groups}[self.scales]
        return total / (n * k)


@dataclass(frozen=True)
class VqGeneral:
    """A quantized matrix of any shape, its codebooks and scales as the values that they stand for.

    Attributes:
        indices: int32 `[n, vectors]`.
        codebooks: float32 `[blocks down, blocks across, centroids, dim]`.
        scales: float32 `[n, groups]`.
        columns: k.
        shape: how they belong together.
    """

    indices: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor
    columns: int
    shape: VqShape

    def dequantize(self, rows: slice = slice(None)) -> torch.Tensor:
        """W = S · C[index], float32 `[n, k]`, or some of its rows."""
        shape, device = self.shape, self.indices.device
        members = shape.members(self.columns).to(device)
        chosen = self.indices[rows].long()
        row = torch.arange(len(self.indices), device=device)[rows]
        down = row // shape.rows if shape.rows else torch.zeros_like(row)
        across = members[:, 0] // shape.columns if shape.columns else torch.zeros_like(members[:, 0])
        group = members[:, 0] // shape.group if shape.group else torch.zeros_like(members[:, 0])
        vectors = self.codebooks[down[:, None], across[None], chosen] * self.scales[rows][:, group, None]
        made = vectors.new_empty(len(chosen), members.numel())
        made[:, members.reshape(-1)] = vectors.reshape(len(chosen), -1)
        return made[:, : self.columns].contiguous()


VqSolution = VqWeight | VqGeneral
