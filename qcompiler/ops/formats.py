"""Number formats of packed weights and of the activations that meet them. Plain data: imports without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

LAYOUT_VERSION = 1
TILE = 16  # output rows that lie side by side in one unit
ACTIVATION_BLOCK = 128  # inputs that share one activation scale under `INT8_BLOCK`
BITS = (8, 4, 3, 2)
GROUPS = (0, 32, 64, 128)  # 0: one group, the whole row


class Activation(IntEnum):
    """What activations become before they meet the weights; the value is the op's attribute `activation`."""

    FLOAT = 0
    INT8_TOKEN = 1
    INT8_BLOCK = 2
    INT8_STATIC = 3

    @property
    def label(self) -> str:
        return ("float", "int8-token", f"int8-block{ACTIVATION_BLOCK}", "int8-static")[self]

    @classmethod
    def parse(cls, label: str) -> Activation:
        for member in cls:
            if member.label == label:
                return member
        raise ValueError(f"unknown activation format {label!r}; known: {', '.join(m.label for m in cls)}")


@dataclass(frozen=True)
class AffineFormat:
    """W = S · (q − Z) with q of `bits` bits, one S (and Z) per row and `group` columns.

    Attributes:
        bits: 8, 4, 3 or 2.
        group: columns that share a scale: 32, 64, 128, or 0 for the whole row. The last group may be short.
        symmetric: Z fixed (0 for 8 bits, 2^(bits-1) for unsigned codes of fewer bits) and not stored.
    """

    bits: int
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS} (0 = the whole row), got {self.group!r}")

    @property
    def label(self) -> str:
        """For instance `int4-g32-sym` or `int8-row-asym`."""
        group = f"g{self.group}" if self.group else "row"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, label: str) -> AffineFormat:
        match = re.fullmatch(r"int([2348])-(row|g(\d+))-(sym|asym)", label)
        if not match:
            raise ValueError(f"unknown weight format {label!r}; expected e.g. 'int4-g32-sym'")
        return cls(int(match[1]), int(match[3] or 0), match[4] == "sym")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: signed for 8 bits, unsigned below."""
        return (-128, 127) if self.bits == 8 else (0, 2**self.bits - 1)

    @property
    def center(self) -> int:
        """Z of the symmetric form."""
        return 0 if self.bits == 8 else 2 ** (self.bits - 1)

    def groups(self, k: int) -> int:
        """Groups in a row of k columns."""
        return -(-k // self.group) if self.group else 1


# Centroids of each vector dimension that have a packed index (docs/layout.md).
CENTROIDS = {1: (4, 8, 16), 2: (16, 32, 64, 256), 4: (256,)}


@dataclass(frozen=True)
class VqFormat:
    """W = S · c · C[index]: vectors of `dim` columns are entries of a codebook that a block of weights shares.

    The columns of a vector lie at distance 4: vector i of the block of 4·dim columns from b holds b + i + 4·j, j < dim.

    Attributes:
        dim: columns of a vector: 1, 2 or 4.
        centroids: entries of a codebook, int8 `[dim]` each: see `CENTROIDS`.
        block_rows, block_columns: weights that share a codebook and its fp16 scale c: multiples of 16 rows and of 128 columns,
            0 for all of the matrix. The last block may be short.
        group: columns of a row that share an fp16 scale S: 32, 64, 128, or 0 for the whole row.
    """

    dim: int
    centroids: int
    block_rows: int
    block_columns: int
    group: int

    def __post_init__(self) -> None:
        if self.dim not in CENTROIDS:
            raise ValueError(f"vectors of {self.dim!r} columns have no packed form; known: {', '.join(map(str, CENTROIDS))}")
        if self.centroids not in CENTROIDS[self.dim]:
            known = ", ".join(map(str, CENTROIDS[self.dim]))
            raise ValueError(f"{self.centroids!r} centroids of {self.dim} columns have no packed index; known: {known}")
        for name, value, step in (("rows", self.block_rows, TILE), ("columns", self.block_columns, ACTIVATION_BLOCK)):
            if value < 0 or value % step:
                raise ValueError(f"a codebook's {name} must be a multiple of {step}, or 0 for all, got {value!r}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS} (0 = the whole row), got {self.group!r}")

    @property
    def label(self) -> str:
        """For instance `vq2d64-b32x256-g128`; a side of 0 is written `all`."""
        rows, columns = (value or "all" for value in (self.block_rows, self.block_columns))
        return f"vq{self.dim}d{self.centroids}-b{rows}x{columns}-{f'g{self.group}' if self.group else 'row'}"

    @classmethod
    def parse(cls, label: str) -> VqFormat:
        match = re.fullmatch(r"vq(\d+)d(\d+)-b(\d+|all)x(\d+|all)-(row|g(\d+))", label)
        if not match:
            raise ValueError(f"unknown weight format {label!r}; expected e.g. 'vq2d64-b32x256-g128'")
        rows, columns = (0 if side == "all" else int(side) for side in (match[3], match[4]))
        return cls(int(match[1]), int(match[2]), rows, columns, int(match[6] or 0))

    @property
    def index_bits(self) -> int:
        """Bits of an index."""
        return self.centroids.bit_length() - 1

    @property
    def span(self) -> int:
        """Columns of a block of four vectors."""
        return 4 * self.dim

    def groups(self, k: int) -> int:
        """Scales in a row of k columns."""
        return -(-k // self.group) if self.group else 1

    def blocks(self, n: int, k: int) -> tuple[int, int]:
        """Codebooks of an n x k matrix, down and across."""
        across = -(-k // self.block_columns) if self.block_columns else 1
        return (-(-n // self.block_rows) if self.block_rows else 1), across

    def vectors(self, k: int) -> int:
        """Indices of a row: four for every started `span` columns."""
        return -(-k // self.span) * 4


WeightFormat = AffineFormat | VqFormat


def parse_weight_format(label: str) -> WeightFormat:
    """The format of a label."""
    return VqFormat.parse(label) if label.startswith("vq") else AffineFormat.parse(label)
