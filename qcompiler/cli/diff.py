"""Show what differs between two artifacts, or what a range of passes did. What did not change is hidden."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.options import add_json
from qcompiler.errors import UsageError

NAME = "diff"
HELP = "differences of two artifacts, or of two passes of one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B", nargs="?")
    parser.add_argument("--passes", metavar="P..Q", help="what the passes after P up to Q did, within A")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.report.diff import diff_artifacts, diff_passes
    from qcompiler.report.tables import show

    if (options.second is None) == (options.passes is None):
        raise UsageError("give either a second artifact or --passes P..Q")
    if options.passes is not None:
        document = diff_passes(options.first, options.passes)
    else:
        document = diff_artifacts(options.first, options.second)
    show(document, options.json)
    return 0
