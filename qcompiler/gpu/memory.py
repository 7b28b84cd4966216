"""What is made once of a weight and kept: in memory that no CUDA graph takes back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def capturing(place: torch.device) -> bool:
    """Whether a graph is being captured: what is allocated now belongs to it, and holds nothing before it is replayed."""
    return place.type == "cuda" and torch.cuda.is_current_stream_capturing()


def apart(make: Callable[[], torch.Tensor], place: torch.device) -> torch.Tensor:
    """`make()`; for a GPU by a thread of its own, on the stream of this one.

    `torch.compile(mode="max-autotune")` runs a program once before it captures it. All that the thread allocates then comes out
    of the graphs' memory, and torch ends the run where some of it is kept.
    """
    if place.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(place)

    def there() -> torch.Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(there).result()
