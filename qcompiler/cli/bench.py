"""Measure how fast an artifact reads a prompt and writes tokens on this machine; median of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.options import add_device, add_dtype, add_json, positive

NAME = "bench"
HELP = "tokens per second of an artifact on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--prompt-tokens", type=positive, metavar="N", help="tokens to read (default: 512)")
    parser.add_argument("--new-tokens", type=positive, metavar="N", help="tokens to write (default: 64)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="runs after one warm-up (default: 5)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")
    add_device(parser, "where to run an artifact of target torch")
    add_dtype(parser)
    parser.add_argument("--portable", action="store_true", help="measure without the op library")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.report.benched import benched_document
    from qcompiler.report.tables import show
    from qcompiler.runtime.bench import bench

    names = ("prompt_tokens", "new_tokens", "repeats")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    given |= {"device": options.device, "dtype": options.dtype}
    result = bench(options.directory, threads=options.threads, portable=options.portable, **given)
    show(benched_document(str(options.directory), result, options.portable), options.json)
    return 0
