"""Measure how fast an artifact reads a prompt and writes tokens on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.options import add_json, positive

NAME = "bench"
HELP = "tokens per second of an artifact on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")
    parser.add_argument("--portable", action="store_true", help="measure without the op library")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.runtime.bench import bench

    raise NotImplementedError(bench)
