"""Option types and small helpers that several commands share."""

from __future__ import annotations

import argparse
import importlib
import re
from types import ModuleType
from typing import TYPE_CHECKING

from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.report.progress import make_reporter

if TYPE_CHECKING:
    from qcompiler.report.progress import Bars, Plain, Silent


def positive(text: str) -> int:
    """A whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "tb": 10**12}


def byte_count(text: str) -> int:
    """A size such as 4GiB, 500MB or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 500MB, found {text!r}")
    value = int(float(match[1]) * _UNITS[match[2].lower()])
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size above 0, found {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number, at least 0 and finite."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, found {text}")
    return value


# argparse names the type by its function in messages: "invalid whole number value: 'x'".
positive.__name__ = "whole number"
not_negative.__name__ = "number"


def device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`."""
    from qcompiler.runtime.device import device_name

    try:
        return device_name(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """The option --device; `what` happens there."""
    parser.add_argument("--device", type=device, metavar="D", default="cpu", help=f"{what}: cpu (default), cuda or cuda:N")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option --dtype."""
    from qcompiler.runtime.device import DTYPES

    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of float activations; the short ones on a GPU")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def reporter(options: argparse.Namespace) -> Silent | Plain | Bars:
    """The reporter for this call."""
    return make_reporter(quiet=options.quiet)


def compile_side(module: str, command: str) -> ModuleType:
    """Import a module of the compiler, which needs more than the minimal install has.

    Raises:
        UnsupportedError: a package is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.partition(".")[0] == "qcompiler":
            raise
        raise UnsupportedError(
            f"`qcompiler {command}` needs the package {missing}, which is not installed: "
            "pip install 'qcompiler[compile]'"
        ) from error
