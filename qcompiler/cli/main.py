"""The parser, and what every command shares: errors to exit codes, signals, broken pipes, crash records."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from qcompiler.artifact.files import disk_full
from qcompiler.artifact.interrupt import Terminated, sigterm_raises
from qcompiler.artifact.manifest import version
from qcompiler.cli import (
    bench,
    compare,
    compile,
    crash,
    diff,
    doctor,
    eval,
    inspect,
    library,
    repack,
    run,
    sensitivity,
    verify,
)
from qcompiler.errors import CapacityError, QCompilerError, UsageError

INTERRUPTED = 130

EXIT_CODES = """\
exit codes:
  0    done
  1    a bug in qcompiler; a crash record is written, and the last line says where
  2    wrong usage: an unknown option, recipe or key
  3    an input cannot be read or is refused
  4    the model, an op or a format is not supported, or a package for it is missing
  5    a verification or quality gate failed
  6    it would not fit: memory, disk, size budget, or a prompt beyond the context
  75   stopped on request at a point from which it can be resumed
  130  interrupted (Ctrl-C or SIGTERM); no artifact was written
"""

_COMMANDS = (compile, run, eval, compare, sensitivity, inspect, diff, verify, bench, doctor, library, repack)


class _Parser(argparse.ArgumentParser):
    """argparse that reports a wrong call as UsageError, so that there is one way from an error to an exit code."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}\n(`{self.prog} --help` says more)")


class _CommandParser(_Parser):
    """Options may stand between positional arguments: `run DIR --seed 1 "prompt"`. Plain argparse gives an optional
    positional its default as soon as an option comes first."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    # Both places work: `qcompiler --debug run …` and `qcompiler run … --debug`. SUPPRESS keeps the second from
    # resetting what the first has set.
    common = _CommandParser(add_help=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    common.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress and no notes")
    parser = _Parser(
        prog="qcompiler",
        description="A quantizing compiler: transformer models in, small and fast ONNX artifacts out.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qcompiler {version()}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(execute=command.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `qcompiler --help`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = argparse.Namespace(debug="--debug" in argv, quiet=False, command=None)
    try:
        with sigterm_raises():
            build_parser().parse_args(argv, namespace=options)
            code = int(options.execute(options))
            # Here and not at exit, where an error could no longer become an exit code.
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # --help, --version
        return stop.code if isinstance(stop.code, int) else 0
    except BaseException as error:
        return _report(error, argv, options)


def _report(error: BaseException, argv: list[str], options: argparse.Namespace) -> int:
    """Say what went wrong in one place; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read us has seen enough. Python flushes stdout once more at exit; that must not fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        kept = "no artifact was written" if getattr(error, "__notes__", ()) else "nothing was saved"
        _say("terminated" if isinstance(error, Terminated) else "interrupted", kept)
        _say_notes(error)
        return INTERRUPTED
    known = _as_known(error)
    if known is None:
        place = crash.write(error, argv, options)
        _say("internal error", f"{type(error).__name__}; this is a bug in qcompiler. Details: {place}")
        _say_notes(error)
        return 1
    _say("error", str(known))
    _say_notes(error)
    return known.exit_code


def _as_known(error: BaseException) -> QCompilerError | None:
    """The error as one of ours, where a plain exception has a plain meaning for the user."""
    if isinstance(error, QCompilerError):
        return error
    if isinstance(error, MemoryError):
        return CapacityError(f"out of memory{': ' + str(error) if str(error) else ''}")
    if (full := disk_full(error)) is not None:
        return CapacityError(f"{full[0]}{' while writing ' + full[1] if full[1] else ''}: {error}")
    return None


def _say_notes(error: BaseException) -> None:
    """What was added to the error on its way: what is left behind, and what to do with it."""
    for note in getattr(error, "__notes__", ()):
        _say("note", note)


def _say(kind: str, message: str) -> None:
    try:
        print(f"qcompiler: {kind}: {message}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads stderr; the exit code still tells
