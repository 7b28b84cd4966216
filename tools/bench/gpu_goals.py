"""What the GPU kernels are meant to reach beside float16 and other programs, and what a run found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SMALL, LARGE = ((4096, 4096),), ((8192, 8192), (16384, 16384))


@dataclass(frozen=True)
class Goal:
    """`side` takes at most 1 / `must` (1 / `good`) of the time of `against`; `shapes` None: any."""

    side: str
    against: str
    rows: int
    must: float
    good: float
    shapes: tuple[tuple[int, int], ...] | None = None

    def found(self, setting: dict[str, Any]) -> float | None:
        """How many times as fast the side was; None where a setting did not measure this."""
        if setting["rows"] != self.rows or (self.shapes is not None and (setting["n"], setting["k"]) not in self.shapes):
            return None
        side = setting["sides"].get(self.side)
        return None if side is None else side["ratios"].get(self.against)


FLOAT = "float16"
_WEIGHT_ONLY = ("int4-g128", "vq2", "vq3", "vq4", "vq2-4d", "nf4")
GOALS = (
    Goal("int4-g128", FLOAT, 1, 1.4, 1.7, SMALL),
    Goal("int4-g128", FLOAT, 1, 1.6, 2.0, LARGE),
    Goal("int4-g128", FLOAT, 16, 1.2, 1.4),
    Goal("int8", FLOAT, 1, 1.5, 1.7),
    Goal("vq4", FLOAT, 1, 1.1, 1.3),
    Goal("vq3", FLOAT, 1, 1.3, 1.6),
    *(Goal(side, FLOAT, rows, 0.55, 0.8) for side in _WEIGHT_ONLY for rows in (64, 256)),
    *(Goal(side, FLOAT, 4096, 0.9, 0.95) for side in _WEIGHT_ONLY),
    *(Goal("int8 int8", "bfloat16", rows, 1.3, 1.5) for rows in (256, 4096)),
    *(Goal("int4-g128", peer, rows, 1.0, 1.0) for peer in ("torch-int4-g128", "gemlite-int4-g128") for rows in (1, 4, 16)),
    *(Goal("nf4", "bitsandbytes-nf4", rows, 1.0, 1.0) for rows in (1, 4, 16)),
)


def found(settings: list[dict[str, Any]]) -> Iterator[tuple[Goal, dict[str, Any], float]]:
    """Every goal that a setting measured."""
    for goal in GOALS:
        for setting in settings:
            ratio = goal.found(setting)
            if ratio is not None:
                yield goal, setting, ratio
