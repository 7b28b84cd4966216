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
