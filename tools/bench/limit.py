"""How fast this machine reads a file's mapped pages and does nothing else: what decoding can be held against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DESCRIPTION = "largest element of the mapped weights as uint64 (numpy maximum.reduce), each thread one contiguous share"


class Read:
    """A file, mapped and read once, so that later reads find its pages in memory."""

    def __init__(self, path: Path, threads: int) -> None:
        size = path.stat().st_size // 8
        self._data = np.memmap(path, np.uint64, "r", shape=(size,))
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads
        self.once(1)

    def once(self, threads: int) -> float:
        """Bytes a second of one pass over the whole file (several passes where it is small)."""
        parts = np.array_split(self._data, threads)
        passes = max(1, 2**26 // self._data.nbytes)
        start = time.perf_counter()
        for part in [self._pool.submit(_read, part, passes) for part in parts]:
            part.result()
        return passes * self._data.nbytes / (time.perf_counter() - start)

    def best(self, repeats: int = 3) -> float:
        """The fastest of `repeats` passes with every number of threads up to the given one."""
        return max(self.once(n) for n in range(1, self._threads + 1) for _ in range(repeats))


def _read(part: np.ndarray, passes: int) -> None:
    for _ in range(passes):
        np.maximum.reduce(part)  # lets go of the interpreter's lock, and is vectorised on every machine
