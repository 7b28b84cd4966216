"""Anonymous memory: what a process holds that no file backs, and its peak over a block.

Weights that are mapped from a file can be dropped and read again; only anonymous and shared pages count against a budget.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_ANONYMOUS = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.M)


def anonymous_bytes() -> int:
    """RssAnon + RssShmem of this process, in bytes.

    Raises:
        OSError: the system does not tell (not Linux).
    """
    found = _ANONYMOUS.findall(_STATUS.read_text())
    if len(found) != 2:
        raise OSError(f"{_STATUS} lists {len(found)} of RssAnon and RssShmem; expected both (Linux 4.5 or later)")
    return 1024 * sum(int(kilobytes) for kilobytes in found)


class PeakAnonymous:
    """Context manager: samples `anonymous_bytes` on a thread; Linux keeps no such peak by itself.

    Args:
        interval: seconds between samples. What lives shorter may be missed.

    Attributes:
        start: bytes when the block was entered.
        peak: the most bytes that a sample saw; the start and the end of the block are among the samples.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.start = self.peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def growth(self) -> int:
        """The peak beyond what was held at the start, in bytes."""
        return self.peak - self.start

    def __enter__(self) -> PeakAnonymous:
        self.start = self.peak = anonymous_bytes()
        self._done.clear()
        self._thread = threading.Thread(target=self._sample, name="peak-anonymous", daemon=True)
        self._thread.start()
        return self

    def restart(self) -> int:
        """The peak so far; it begins anew at what is held now."""
        self.peak, peak = anonymous_bytes(), max(self.peak, anonymous_bytes())
        return peak

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _sample(self) -> None:
        while not self._done.wait(self.interval):
            self.peak = max(self.peak, anonymous_bytes())
