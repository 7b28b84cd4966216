"""What a compile would need, estimated before it is done: memory, and the size of what it would write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.pipeline.instruments import peak_rss_bytes

if TYPE_CHECKING:
    import torch

    from qcompiler.quantizer import Quantizer

# Measured on llamas of 1.4 to 123 million weights; tests hold the estimate against a real compile.
# Float copies of the largest weight that live at once while it is solved and its error is summed in float64.
SOLVE_COPIES = 8.5
# What torch.onnx, onnxscript and the graphs take once the exporter runs.
EXPORT_BYTES = 30 * 2**20
# Bytes of a graph by target: what every one has (function bodies among it), and what a quantized layer adds.
GRAPH_BYTES = {"onnx": (18_000, 1_050), "onnx-stock": (3_000, 1_000), "torch": (27_000, 26_800)}


def peak_memory(quantizer: Quantizer, module: torch.nn.Module, packed: int) -> dict[str, int]:
    """The most memory that a compile holds at once, by what holds it; the values add up to the peak.

    To be called when the model is loaded and captured: what the process holds then is measured, the rest is estimated.

    Args:
        packed: bytes of the packed weights.
    """
    assert quantizer.graph is not None and quantizer.context is not None
    weights = _tensor_bytes(module)
    solved = [site for site in quantizer.graph.sites if site.name in quantizer.context.schemes]
    # A solution keeps a byte a code until everything is written, beside the weights that it is packed into.
    codes = sum(site.size for site in _once(solved))
    largest = max((4 * site.size for site in solved), default=0)
    return {
        "process": max(current_rss_bytes() - weights, 0),
        "float_weights": weights,
        "export": EXPORT_BYTES,
        "codes": codes,
        # The two do not meet: the packed weights are made when the last layer is solved.
        "largest_layer_or_packed": max(int(SOLVE_COPIES * largest), packed),
    }


def file_sizes(quantizer: Quantizer, module: torch.nn.Module, packed: dict[str, int], target: str) -> dict[str, int]:
    """Bytes of the model's files by what they are, as layers.json has them; `graph` and `alignment` are rough."""
    assert quantizer.graph is not None and quantizer.context is not None
    sites = [site for site in quantizer.graph.sites if site.name in quantizer.context.schemes]
    graph, layer = GRAPH_BYTES[target]
    in_float = _tensor_bytes(module) - sum(4 * site.size for site in _once(sites))
    sizes = {
        **packed,
        "float": max(in_float, 0),
        # Half a step before each: codes of 1 MiB and more start at multiples of 64 KiB, the others of 64 bytes.
        "alignment": sum(32 * 1024 if site.size >= 2 * 2**20 else 32 for site in _once(sites)),
        "graph": graph + layer * len(sites),
    }
    return sizes | {"total": sum(sizes.values())}


def current_rss_bytes() -> int:
    """Memory that this process holds now; its peak where the system does not tell."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else peak_rss_bytes()


def _tensor_bytes(module: torch.nn.Module) -> int:
    """Parameters, each storage once."""
    sizes = {p.untyped_storage().data_ptr() or id(p): p.numel() * p.element_size() for p in module.parameters()}
    return sum(sizes.values())


def _once(sites: list[Any]) -> list[Any]:
    """Sites without the second of a tied pair."""
    return list({site.tie_group if site.tie_group is not None else site.name: site for site in sites}.values())
