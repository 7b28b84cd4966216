"""What decoding aims at on the random models, and whether a run reached it."""

from __future__ import annotations

import statistics
from typing import Any

from tools.bench import models

OF_READ = 0.80  # of the read limit divided by the bytes that a token reads, for each of these recipes
RECIPES = ("int8", "int4", "vq3", "vq2")
# Tokens a second: ours, the peer, how many times as fast.
DECODE = (("vq2", "llama.cpp Q2_K", 1.8), ("vq2", "llama.cpp Q4_0", 1.8), ("int4", "llama.cpp Q4_0", 1.3))
PREFILL = 1.3  # times the best of llama.cpp's
LOADED = 0.05  # of the file, in anonymous memory, at most


def goals(case: dict[str, Any]) -> list[dict[str, Any]]:
    """`what`, `expected` (at least), `found` and `met`, of those goals whose sides were measured; the random models only."""
    if case["model"] not in models.SHAPES:
        return []
    sides, result = case["sides"], []

    def goal(what: str, expected: float, found: float) -> None:
        result.append({"what": what, "expected": expected, "found": found, "met": found >= expected})

    own = [name for name in RECIPES if name in sides]
    for name in own:
        goal(f"{name}: decode / read limit", OF_READ, sides[name]["share_of_read"]["median"])
    for name, peer, least in DECODE:
        if name in sides and peer in sides:
            goal(f"{name} / {peer}: decode", least, sides[name]["ratios"][peer]["decode"]["median"])
    rivals = [name for name, side in sides.items() if side["kind"] == "llama"]
    for name in own if rivals else []:
        goal(f"{name} / llama.cpp's best: prefill", PREFILL, _against_best(case, name, rivals, "prefill"))
    for name in own:
        if (memory := sides[name]["memory"]) is not None:
            extra = memory["loaded_anonymous"] / sides[name]["file_bytes"]
            goal(f"{name}: 1 - anonymous memory after load / file", 1 - LOADED, 1 - extra)
    return result


def _against_best(case: dict[str, Any], name: str, rivals: list[str], rate: str) -> float:
    """The median over rounds of `name`'s rate by the highest of the rivals' in the same round."""
    own = case["sides"][name][rate]["samples"]
    best = [max(rates) for rates in zip(*(case["sides"][rival][rate]["samples"] for rival in rivals), strict=True)]
    return statistics.median(a / b for a, b in zip(own, best, strict=True))
