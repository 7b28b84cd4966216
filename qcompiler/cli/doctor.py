"""What this machine has: CPU features, the kernels chosen, GPUs, the versions found. Exit code 0 when artifacts can run."""

from __future__ import annotations

import argparse

from qcompiler.cli.options import add_json

NAME = "doctor"
HELP = "CPU features, chosen kernels, GPUs, versions found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.report.doctor import diagnose
    from qcompiler.report.tables import show

    document, code = diagnose()
    show(document, options.json)
    return code
