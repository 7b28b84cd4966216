"""Times of kernels on a GPU: calls captured in a CUDA graph that reads more weights than the second cache holds.

A graph has every call once, each with a matrix of its own, and is replayed; one replay gives one sample, the seconds of a call.
So there is no launch from the host between kernels, no weight is in the cache when its turn comes, and events measure stretches
that are long beside their resolution. Activations stay in the cache, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

COLD_BYTES = 256 * 2**20  # of weights in a graph, at least, and
COLD_CACHES = 4  # times the second cache
LEAST = 2e-4  # seconds of a replay, which events measure to a per cent or better
WARM = 3
COPY_BYTES = 2**30


def cold_bytes(device: torch.device) -> int:
    """Bytes of weights of which none is in the second cache of the device when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(COLD_BYTES, COLD_CACHES * cache)


def copies(matrix_bytes: int, cold: int = COLD_BYTES) -> int:
    """Matrices of that size that a graph goes through, `cold` bytes together at least."""
    return max(1, -(-cold // matrix_bytes))


def samples(calls: Sequence[Callable[[], Any]], replays: int) -> list[float]:
    """Seconds of a call, one figure a replay of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, derives what is kept of each weight
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = _captured(calls, 1)
    once = _replay(graph)
    if once < LEAST:
        times = int(np.ceil(LEAST / max(once, 1e-6)))
        graph = _captured(calls, times)
    else:
        times = 1
    for _ in range(WARM):
        graph.replay()
    return [_replay(graph) / (times * len(calls)) for _ in range(replays)]


def _captured(calls: Sequence[Callable[[], Any]], times: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: torch keeps one for all captures, of the device that was current at the first.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for _ in range(times):
            for call in calls:
                call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def spread(found: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples."""
    low, median, high = np.percentile(found, [20, 50, 80]).tolist()
    return {"median": median, "p20": low, "p80": high, "samples": list(found)}


def copy_rate(device: torch.device, replays: int) -> dict[str, Any]:
    """Bytes a second that a device copy reads and writes together: the limit of what any kernel moves."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return spread([2 * COPY_BYTES / seconds for seconds in samples([lambda: target.copy_(source)], replays)])
