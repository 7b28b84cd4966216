"""What a compile would need, estimated before it is done: memory, and the size of what it would write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompiler.pipeline.instruments import peak_rss_bytes
from qcompiler.pipeline.memory import anonymous_bytes

if TYPE_CHECKING:
    import torch

    from qcompiler.capture.prepared import Prepared
    from qcompiler.quantizer import Quantizer

# Measured on llamas of 1.4 to 500 million weights; tests hold the estimate against a real compile.
# Of the largest weight's float32 bytes: its codes, and the pieces that they are put together from.
SOLVE_SHARE = 0.6
# What torch.onnx, onnxscript and the graphs take once the exporter runs.
EXPORT_BYTES = 50 * 2**20
# Bytes of a graph by target: what every one has (function bodies among it), and what a quantized layer adds.
GRAPH_BYTES = {"onnx": (18_000, 1_050), "onnx-stock": (3_000, 1_000), "torch": (29_000, 19_100)}
# The function body of attention over a cache.
ATTENTION_BYTES = 36_000


def peak_memory(quantizer: Quantizer, held: int, widened: bool) -> dict[str, int]:
    """The most anonymous memory that a compile without calibration holds at once, by what holds it; the values add up.

    Weights of a checkpoint, solutions and packed weights lie in files: the system drops and re-reads their pages as it
    needs, and they do not count. To be called when the model is loaded and captured: what the process holds then is
    measured, the rest is estimated.

    Args:
        held: bytes of the weights that are in memory: those of a model that was not read from a checkpoint.
        widened: whether weights are stored narrower than float32, and read into memory one at a time.
    """
    assert quantizer.graph is not None and quantizer.context is not None
    solved = [site for site in quantizer.graph.sites if site.name in quantizer.context.schemes]
    # A matrix at a time, also of experts.
    largest = max((4 * site.shape[0] * site.shape[1] for site in solved), default=0)
    return {
        "process": max(_process_bytes() - held, 0),
        "float_weights": held,
        "export": EXPORT_BYTES,
        "largest_layer": int((SOLVE_SHARE + widened) * largest),
    }


def file_sizes(quantizer: Quantizer, prepared: Prepared, packed: dict[str, int], target: str) -> dict[str, int]:
    """Bytes of the model's files by what they are, as layers.json has them; `graph` and `alignment` are rough."""
    assert quantizer.graph is not None and quantizer.context is not None
    sites = [site for site in quantizer.graph.sites if site.name in quantizer.context.schemes]
    graph, layer = GRAPH_BYTES[target]
    if target == "onnx" and quantizer.recipe.own_attention and prepared.kind == "decoder" and prepared.whole is None:
        graph += ATTENTION_BYTES
    in_float = float_bytes(prepared.module) - sum(4 * site.size for site in _once(sites))
    sizes = {
        **packed,
        "float": max(in_float, 0),
        # Half a step before each: codes of 1 MiB and more start at multiples of 64 KiB, the others of 64 bytes.
        "alignment": sum(32 * 1024 if site.size >= 2 * 2**20 else 32 for site in _once(sites)),
        "graph": graph + layer * len(sites),
    }
    return sizes | {"total": sum(sizes.values())}


def _process_bytes() -> int:
    """Anonymous memory that this process holds now; the peak of all where the system does not tell."""
    try:
        return anonymous_bytes()
    except OSError:
        return peak_rss_bytes()


def float_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters, each storage once; what stands in for a stored weight counts as float32."""
    sizes = {p.untyped_storage().data_ptr() or id(p): p.numel() * p.element_size() for p in module.parameters()}
    return sum(sizes.values())


def _once(sites: list[Any]) -> list[Any]:
    """Sites without the second of a tied pair."""
    return list({site.tie_group if site.tie_group is not None else site.name: site for site in sites}.values())
