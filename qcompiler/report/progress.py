"""Progress of long work: a bar with the layer's name and the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Plain lines go to logs: more than one in this many seconds is noise, unless layers themselves are slower.
PLAIN_INTERVAL = 2.0


class Reporter(Protocol):
    """What long work tells the user. Everything goes to stderr: stdout is for data."""

    def stage(self, name: str) -> None:
        """A stage begins: `capture`, `solve`, `evaluate`. The stage before it is over."""

    def layer(self, i: int, n: int, name: str, message: str = "") -> None:
        """Layer `i` of `n`, counted from 1. Without a message its work begins; with one it is done."""

    def solved(self, i: int, n: int, name: str, message: str) -> None:
        """Layer `i` of `n` is done, and its line is worth keeping: never left out, on a terminal neither."""

    def note(self, message: str) -> None:
        """Something worth knowing that needs no action."""

    def warning(self, message: str) -> None:
        """Something that the user may want to act on."""


class Silent:
    """Says nothing: for library use, and for `--quiet`."""

    def stage(self, name: str) -> None: ...

    def layer(self, i: int, n: int, name: str, message: str = "") -> None: ...

    def solved(self, i: int, n: int, name: str, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Pace:
    """Estimates the time left of a stage from the layers done so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._first = 0

    def restart(self, done: int = 0) -> None:
        """A new stage, of which `done` layers need no work (resumed)."""
        self._start, self._first = self._clock(), done

    def left(self, done: int, total: int) -> float | None:
        """Seconds left, or None while nothing is known."""
        if done <= self._first:
            return None
        return (self._clock() - self._start) / (done - self._first) * max(total - done, 0)


def duration(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Plain:
    """One line at a time with fixed columns, at most one every two seconds or one per layer."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._stage = ""
        self._last = float("-inf")
        self._pace = Pace(clock)

    def stage(self, name: str) -> None:
        self._stage = name
        self._pace.restart()
        self._last = float("-inf")
        self._line(name)

    def layer(self, i: int, n: int, name: str, message: str = "") -> None:
        done = i if message else i - 1
        now = self._clock()
        if now - self._last < PLAIN_INTERVAL and not (message and i >= n):
            return
        self._last = now
        left = self._pace.left(done, n)
        tail = f"  {duration(left)} left" if left else ""
        width = len(str(n))
        self._line(f"{self._stage:<18} {i:>{width}}/{n}  {name}{'  ' + message if message else ''}{tail}")

    def solved(self, i: int, n: int, name: str, message: str) -> None:
        left = self._pace.left(i, n)
        tail = f"  {duration(left)} left" if left else ""
        self._line(f"{self._stage:<18} {i:>{len(str(n))}}/{n}  {name}  {message}{tail}")

    def note(self, message: str) -> None:
        self._line(f"note: {message}")

    def warning(self, message: str) -> None:
        self._line(f"warning: {message}")

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Bars:
    """One bar a stage (needs rich and a terminal)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(file=stream if stream is not None else sys.stderr)
        self._progress: Progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="cyan", markup=False),
            TextColumn("{task.fields[layer]}", style="dim", markup=False),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._pace = Pace()
        self._started = False

    def stage(self, name: str) -> None:
        self._finish()
        self._start()
        self._pace.restart()
        self._task = self._progress.add_task(name, total=None, left="", layer="")

    def layer(self, i: int, n: int, name: str, message: str = "") -> None:
        if self._task is None:
            self.stage("layers")
        assert self._task is not None
        done = i if message else i - 1
        left = self._pace.left(done, n)
        self._progress.update(
            self._task,
            total=n,
            completed=done,
            left=f"{duration(left)} left" if left else "",
            layer=f"{name}  {message}".rstrip(),
        )

    def solved(self, i: int, n: int, name: str, message: str) -> None:
        self.layer(i, n, name, " ")
        self._console.print(f"{i:>{len(str(n))}}/{n}  {name}  {message}", style="dim", markup=False, highlight=False)

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def warning(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def _start(self) -> None:
        if not self._started:
            self._progress.start()
            self._started = True

    def _finish(self) -> None:
        """Close the bar of the stage that is over: full, and without a layer's name."""
        if self._task is None:
            return
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        total = task.total if task.total is not None else 1
        self._progress.update(self._task, total=total, completed=total, left="", layer="")
        self._task = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        if self._started:
            self._progress.stop()
            self._started = False


def make_reporter(quiet: bool = False, stream: TextIO | None = None) -> Silent | Plain | Bars:
    """The reporter that fits the stream (stderr). Use it in a `with` block, so that a bar lets go of the terminal."""
    stream = stream if stream is not None else sys.stderr
    if quiet:
        return Silent()
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        return Bars(stream)
    return Plain(stream)
