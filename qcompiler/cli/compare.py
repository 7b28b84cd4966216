"""Compile a model with several recipes and measure each against the float model: one table to choose from.

With -o artifacts and measurements are kept, and what nothing has changed about is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.artifact.manifest import TARGETS
from qcompiler.cli.options import add_json, compile_side, positive, reporter
from qcompiler.errors import InputError

NAME = "compare"
HELP = "several recipes on one model, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, hub id or `reference`")
    parser.add_argument(
        "--recipes", metavar="R,R…", nargs="+", action="extend", required=True, help="built-in recipes or YAML files"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="keep artifacts and measurements here")
    parser.add_argument("--target", choices=TARGETS, default="onnx", help="what to compile for (default: onnx)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", nargs="+", action="extend", help="evaluation text (default: built in)"
    )
    parser.add_argument("--context", type=positive, metavar="N", help="tokens in an evaluation window")
    parser.add_argument(
        "--windows", "--max-windows", dest="max_windows", type=positive, metavar="N", help="stop after so many windows"
    )
    parser.add_argument(
        "--calibration-text", type=Path, metavar="FILE", nargs="+", action="extend", help="calibration text (default: built in)"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="calibration samples")
    parser.add_argument("--length", type=positive, metavar="L", help="tokens in a calibration sample")
    parser.add_argument("--prompt-tokens", type=positive, metavar="N", help="speed: tokens to read (default: 256)")
    parser.add_argument("--new-tokens", type=positive, metavar="N", help="speed: tokens to write (default: 64)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="speed: rounds over all recipes (default: 5)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    for option in ("text", "calibration_text"):
        for file in getattr(options, option) or ():
            if not file.is_file():
                raise InputError(f"--{option.replace('_', '-')} {file}: no such file")
    names = [name for part in options.recipes for name in part.split(",") if name]
    compare = compile_side("qcompiler.compare", NAME).compare
    from qcompiler.report.compare import compare_document
    from qcompiler.report.tables import show

    # Only what was asked for: the defaults are the function's own.
    asked = (
        "text", "context", "max_windows", "calibration_text", "samples", "length", "prompt_tokens", "new_tokens", "repeats",
        "threads",
    )  # fmt: skip
    given = {name: value for name in asked if (value := getattr(options, name)) is not None}
    with reporter(options) as progress:
        result = compare(options.model, names, output=options.output, target=options.target, reporter=progress, **given)
    show(compare_document(result), options.json)
    return int(result["exit_code"])
