"""The record of a crash: traceback, versions, command line. No weights, no prompts, no texts."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from qcompiler.artifact.manifest import dump_json, version
from qcompiler.report.environment import package_versions

SCHEMA = 1

# Messages of errors raised while texts are handled may quote them; for these commands only types and places are kept.
_HANDLES_TEXT = ("run", "eval", "compare", "sensitivity")


def write(error: BaseException, argv: Sequence[str], options: argparse.Namespace) -> str:
    """Write `crash-<hash>/` into the current directory, or a temporary one; returns a phrase that says where.

    The hash is that of the places in the traceback: the same bug gives the same name.
    """
    trace = _trace(error, with_messages=options.command not in _HANDLES_TEXT)
    name = f"crash-{hashlib.sha256(_places(error).encode()).hexdigest()[:12]}"
    record = {
        "schema": SCHEMA,
        "qcompiler": version(),
        "python": sys.version,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": package_versions(),
        "argv": _public_argv(argv, options),
        "error": type(error).__name__,
        "traceback": trace,
    }
    for parent in (Path.cwd, lambda: Path(tempfile.gettempdir())):
        try:
            folder = parent() / name
            folder.mkdir(exist_ok=True)
            (folder / "crash.json").write_text(dump_json(record), encoding="utf-8")
            (folder / "traceback.txt").write_text("".join(line + "\n" for line in trace), encoding="utf-8")
            return str(folder)
        except OSError:
            continue
    return "could not be written anywhere; run again with --debug"


def _trace(error: BaseException, with_messages: bool) -> list[str]:
    lines: list[str] = []
    for link in _chain(error):
        lines += [line for entry in traceback.format_tb(link.__traceback__) for line in entry.rstrip("\n").split("\n")]
        message = f": {link}" if with_messages and str(link) else ""
        lines.append(f"{type(link).__module__}.{type(link).__qualname__}{message[:2000]}")
    return lines


def _places(error: BaseException) -> str:
    frames = [frame for link in _chain(error) for frame in traceback.extract_tb(link.__traceback__)]
    return "\n".join([type(error).__name__, *(f"{os.path.basename(f.filename)}:{f.name}:{f.lineno}" for f in frames)])


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it, first cause first."""
    links: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in links:
        links.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return links[::-1]


def _public_argv(argv: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The command line without the user's texts."""
    texts = {getattr(options, "prompt", None), *getattr(options, "stop", ())}
    return ["<text>" if argument in texts else argument for argument in argv]
