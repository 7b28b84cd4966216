"""Copy the op library for a program of your own that runs artifacts with plain ONNX Runtime."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.errors import InputError

NAME = "library"
HELP = "copy the op library into a directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace a library that is already there")


def execute(options: argparse.Namespace) -> int:
    from qcompiler.runtime.library import copy_library, library_path

    source = library_path()
    target = options.output / source.name
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"{options.output} is not a directory")
    if target.exists() and not options.overwrite:
        raise InputError(f"{target} exists; --overwrite replaces it")
    try:
        print(copy_library(options.output))
    except OSError as error:
        raise InputError(f"cannot copy {source} to {options.output}: {error.strerror or error}") from error
    return 0
