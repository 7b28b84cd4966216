"""What the commands of the benchmarks share: lists in arguments, a refusal in one line, files that a cut run leaves too."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qcompiler.errors import QCompilerError, UsageError
from qcompiler.report import tables
from qcompiler.report.tables import Document

Results = dict[str, Any]
Keep = Callable[[Results], None]  # called with all that is measured so far


def run(
    program: str, arguments: list[str] | None, measured: Callable[[Keep], Results],
    report: Callable[[Results, list[str]], Document], json: Path | None = None,
    others: Iterable[tuple[Path | None, Callable[[Results, Path], Any]]] = (),
) -> int:  # fmt: skip
    """Measure, write the files and show the table; the code to end with.

    Args:
        program: its name, for a refusal.
        arguments: of the command line; None: those of the process.
        measured: all results; what it gives to `Keep` on the way is in the files at once, so that a run that is cut has it.
        report: of results and arguments.
        json: where the report goes too.
        others: more files, None for one that was not asked for, and what writes each.
    """
    command = sys.argv[1:] if arguments is None else arguments
    write_json = lambda results, path: path.write_text(report(results, command).to_json() + "\n")  # noqa: E731
    files = [(path, write) for path, write in [(json, write_json), *others] if path is not None]

    def keep(results: Results) -> None:
        for path, write in files:
            part = path.with_name(f"{path.name}.part")  # never half a file
            write(results, part)
            part.replace(path)

    try:
        for path, _ in files:
            if not path.parent.is_dir():
                raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
        results = measured(keep)
    except QCompilerError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    keep(results)
    tables.show(report(results, command))
    return 0


class Budget:
    """Seconds that a run may take, from now on; None for any."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise UsageError(f"--budget is {seconds:g}, expected seconds above 0")
        self.seconds, self._start = seconds, time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds, 0 where none are left; None for any."""
        return None if self.seconds is None else max(0.0, self.seconds - (time.monotonic() - self._start))

    @property
    def spent(self) -> bool:
        return self.left == 0


def names(what: str, text: str, known: Iterable[str]) -> list[str]:
    """`NAME,…`, each once; `none` is nothing.

    Raises:
        UsageError: a name that is not known.
    """
    known, found = list(known), [] if text == "none" else text.split(",")
    for name in found:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(found))


def numbers(name: str, text: str) -> list[int]:
    """`N,…`, each once; raises UsageError where that is not what it is."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UsageError(f"--{name} is {text!r}, expected numbers from 1 up with commas between them")
    return list(dict.fromkeys(map(int, text.split(","))))


def shapes(name: str, text: str) -> list[tuple[int, int]]:
    """`NxK,…`, each once; raises UsageError where that is not what it is."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise UsageError(f"--{name} is {text!r}, expected two numbers as 4096x4096, several with commas between them")
    pairs = (part.split("x") for part in text.split(","))
    return list(dict.fromkeys((int(n), int(k)) for n, k in pairs))


def tell(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
