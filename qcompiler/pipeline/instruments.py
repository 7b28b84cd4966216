"""What watches passes run: each sees the graph before and after a pass, and none of it is code in the passes."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Instrument(Protocol):
    """Watches one pass at a time; what `after` returns goes into the pass's timing record."""

    def before(self, graph: Graph) -> None:
        """A pass is about to run."""

    def after(self, graph: Graph) -> dict[str, Any]:
        """The pass has run."""


class Timer:
    """Wall time of a pass, as `milliseconds`."""

    def before(self, graph: Graph) -> None:
        self._start = time.perf_counter()

    def after(self, graph: Graph) -> dict[str, Any]:
        return {"milliseconds": 1000 * (time.perf_counter() - self._start)}


class PeakMemory:
    """The most memory that the process held while a pass ran, as `peak_rss_bytes`.

    Linux forgets the old peak on request; elsewhere it is the peak of the whole process so far.
    """

    def before(self, graph: Graph) -> None:
        _forget_peak()  # not Linux, or not allowed: the figure is then the whole process's

    def after(self, graph: Graph) -> dict[str, Any]:
        return {"peak_rss_bytes": peak_rss_bytes()}


# The most of the peaks that were forgotten since the innermost `HighestPeak` began.
_highest = 0


def _forget_peak() -> bool:
    """Begin a new peak; False where the system cannot."""
    global _highest
    _highest = max(_highest, peak_rss_bytes())
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


class HighestPeak:
    """Context manager: the most memory that the process held during a block, in which `PeakMemory` may watch single passes.

    Attributes:
        bytes: None before the end, and where the system cannot forget the peak from before the block.
    """

    bytes: int | None = None

    def __enter__(self) -> Self:
        global _highest
        self._known = _forget_peak()
        _highest = 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._known:
            self.bytes = max(_highest, peak_rss_bytes())


def peak_rss_bytes() -> int:
    """The most memory that this process has held (on Linux: since the peak was last forgotten)."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
