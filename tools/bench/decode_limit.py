"""How fast this machine reads a file's mapped pages and does nothing else: what decoding can be held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from tools.bench.kernels_limit import Limits

DESCRIPTION = "the fastest of the read loops of kernels_limit.cpp over the side's own mapped weights, on one thread or on all"
PASSES = 5  # a loop's speed is that of its median pass: one lucky pass is no limit


class Read:
    """A file, mapped and read once, so that later reads find its pages in memory."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        self._threads = sorted({1, threads})
        self.best()

    def best(self) -> float:
        """Bytes a second of the fastest loop over the whole file (several passes where it is small)."""
        seconds = []
        for threads in self._threads:
            for loop in Limits(self._data.ctypes.data, self._data.nbytes, threads).reads().values():
                seconds.append(median(_timed(loop) for _ in range(PASSES)))
        return self._data.nbytes / min(seconds)


def _timed(loop: Callable[[], object]) -> float:
    start = time.perf_counter()
    loop()
    return time.perf_counter() - start
