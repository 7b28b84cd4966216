"""How fast this machine reads a file's mapped pages and does nothing else: what decoding can be held against."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tools.bench.kernels_limit import Limits

DESCRIPTION = "the fastest of the read loops of kernels_limit.cpp over any side's mapped weights, on one thread and on all"


class Read:
    """A file, mapped and read once, so that later reads find its pages in memory."""

    def __init__(self, path: Path, threads: int) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        self._threads = sorted({1, threads})
        self.best()

    def best(self) -> float:
        """Bytes a second of the fastest loop over the whole file (several passes where it is small)."""
        passes = max(1, 2**26 // self._data.nbytes)
        seconds = []
        for threads in self._threads:
            for loop in Limits(self._data.ctypes.data, self._data.nbytes, threads).reads().values():
                start = time.perf_counter()
                for _ in range(passes):
                    loop()
                seconds.append((time.perf_counter() - start) / passes)
        return self._data.nbytes / min(seconds)
