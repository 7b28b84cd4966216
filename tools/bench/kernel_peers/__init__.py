"""Other programs' kernels, fed with random weights of their own formats; what is not installed is skipped with a word."""

from __future__ import annotations

from qcompiler.errors import UsageError
from tools.bench.kernel_peers import llama, onnxruntime, openvino, torch
from tools.bench.kernels_side import Side

FAMILIES: dict[str, tuple[Side, ...]] = {
    "onnxruntime": onnxruntime.SIDES,
    "torch": torch.SIDES,
    "openvino": openvino.SIDES,
    "llama.cpp": llama.SIDES,
}


def sides(chosen: str) -> list[Side]:
    """The sides of `chosen`: none, all, or names of programs and of sides, with commas between them."""
    every: dict[str, Side] = {side.name: side for family in FAMILIES.values() for side in family}
    found: dict[str, Side] = {}
    for name in [] if chosen == "none" else chosen.split(","):
        if name == "all":
            found |= every
        elif name in FAMILIES:
            found |= {side.name: side for side in FAMILIES[name]}
        elif name in every:
            found[name] = every[name]
        else:
            raise UsageError(f"unknown peer {name!r}; known: none, all, {', '.join([*FAMILIES, *every])}")
    return list(found.values())
