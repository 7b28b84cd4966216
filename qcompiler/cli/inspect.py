"""Show what an artifact is made of and how it was made, or what is in any ONNX file (weights are not loaded)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qcompiler.cli.options import add_json
from qcompiler.errors import UsageError

NAME = "inspect"
HELP = "recipe, layers, passes and sizes of an artifact; or what is in an ONNX file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR|model.onnx")
    parser.add_argument("--pass", dest="after", metavar="NAME", help="print the graph after that pass (name or number)")
    parser.add_argument("--layer", metavar="GLOB", help="only these layers, with what every pass did to them")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.report.tables import Document, show

    if options.after is not None and options.layer is not None:
        raise UsageError("--pass prints a whole graph; give it without --layer")
    if options.path.is_file():
        if options.after is not None or options.layer is not None:
            raise UsageError(f"{options.path} is a file; --pass and --layer need an artifact's directory")
        from qcompiler.report.inspect_onnx import inspect_onnx

        show(inspect_onnx(options.path), options.json)
        return 0
    from qcompiler.report.inspect import graph_after, inspect_artifact

    if options.after is None:
        show(inspect_artifact(options.path, options.layer), options.json)
        return 0
    text = graph_after(options.path, options.after)
    if options.json:
        show(Document("graph", {"pass": options.after, "text": text}), True)
    else:
        sys.stdout.write(text)
    return 0
