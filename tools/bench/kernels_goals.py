"""What the kernels are meant to reach, as shares of the limits and ratios to other kernels, and what a run found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

READ, COMPUTE = "read", "compute"
SHARES = {READ: "share_of_read", COMPUTE: "share_of_compute"}


@dataclass(frozen=True)
class Goal:
    """`side` reaches `least` times `against`: a limit, or another side in weights a second. `threads` None: any number."""

    side: str
    against: str
    least: float
    rows: int
    threads: int | None = None

    @property
    def text(self) -> str:
        return f"{self.side} / {f'{self.against} limit' if self.against in SHARES else self.against}"

    def spread(self, setting: dict[str, Any]) -> dict[str, Any] | None:
        """Median and quartiles of what a setting found; None where it did not measure this."""
        if setting["rows"] != self.rows or self.threads not in (None, setting["threads"]):
            return None
        side = setting["sides"].get(self.side)
        if side is None:
            return None
        return side[SHARES[self.against]] if self.against in SHARES else side["ratios"].get(self.against)


_AT_LIMIT = ("int8", "int4-g128", "int3-g128", "int2-g128", "vq2", "vq3")
_NEAR_LIMIT = ("int4-g32", "int3-g32", "int2-g32", "vq2.5", "vq4", "vq2-4d", "vq1d-2", "vq1d-3", "vq1d-4", "nf4")
_RATIOS = (
    ("vq2", "int4-g32", 1.75),
    ("vq3", "int4-g32", 1.25),
    ("vq2", "ort-int4-b32", 2.2),
    ("vq2", "ort-int2-b128", 1.1),
    ("int4-g32", "ort-int4-b32", 1.3),
    ("int4-g128", "ort-int4-b128", 0.97),
    # llama.cpp's type that is nearest in bits per weight
    ("int8", "llama-q8_0", 1.5),
    ("int4-g32", "llama-q4_0", 1.5),
    ("int4-g32", "llama-q4_k", 1.5),
    ("vq3", "llama-iq3_s", 1.5),
    ("int3-g128", "llama-iq3_xxs", 1.5),
    ("vq2.5", "llama-q2_k", 1.5),
    ("int2-g32", "llama-q2_k", 1.5),
    ("vq2", "llama-iq2_xs", 1.5),
    ("vq1d-2", "llama-iq2_xxs", 1.5),
)
_PREFILL_128 = ("int8", "int4-g128", "int3-g128", "int2-g128", "vq2", "vq2.5", "vq3", "vq4", "vq1d-2", "vq1d-3", "vq1d-4")
GOALS = (
    *(Goal(side, READ, 0.92, 1, 2) for side in _AT_LIMIT),
    *(Goal(side, READ, 0.85, 1, 1) for side in _AT_LIMIT),
    *(Goal(side, READ, 0.80, 1, 2) for side in _NEAR_LIMIT),
    *(Goal(side, other, least, 1, 2) for side, other, least in _RATIOS),
    *(Goal(side, COMPUTE, 0.85, 512) for side in _PREFILL_128),
    *(Goal(side, COMPUTE, 0.70, 512) for side in ("int4-g32", "int3-g32", "int2-g32")),
    *(Goal(f"int{b}-g{g}", f"ort-int{b}-b{g}", 1.0, 512) for b in (4, 2) for g in (32, 128)),
    *(Goal("int8", f"ort-int8-b{g}", 1.0, 512) for g in (32, 128)),
    Goal("int8", "ort-dynamic-int8", 1.0, 512),
)


def found(settings: list[dict[str, Any]]) -> Iterator[tuple[Goal, int, dict[str, Any]]]:
    """Every goal that a setting measured, with its threads and what it found."""
    for goal in GOALS:
        for setting in settings:
            spread = goal.spread(setting)
            if spread is not None:
                yield goal, setting["threads"], spread
