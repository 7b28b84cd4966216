"""Other programs' kernels, fed with random weights of their own formats; what is not installed is skipped with a word."""

from __future__ import annotations

from tools.bench.kernel_peers import llama, onnxruntime, openvino, torch
from tools.bench.kernels_side import Side
from tools.bench.peer_choice import chosen_sides

FAMILIES: dict[str, tuple[Side, ...]] = {
    "onnxruntime": onnxruntime.SIDES,
    "torch": torch.SIDES,
    "openvino": openvino.SIDES,
    "llama.cpp": llama.SIDES,
}


def sides(chosen: str) -> list[Side]:
    """The sides of `chosen`: none, all, or names of programs and of sides, with commas between them."""
    return list(chosen_sides(FAMILIES, chosen).values())
