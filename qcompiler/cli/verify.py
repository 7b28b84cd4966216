"""Check every file of an artifact against the manifest's SHA-256: a changed, missing or added file is an error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.cli.options import add_json
from qcompiler.errors import GateError

if TYPE_CHECKING:
    from qcompiler.runtime.artifact import Artifact

NAME = "verify"
HELP = "check every file of an artifact against its manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    from qcompiler.report.tables import Document, Text, show

    files, size = verify(options.directory)
    data = {"artifact": str(options.directory), "ok": True, "files": files, "bytes": size}
    lines = [f"{options.directory}: {files} files, {size:,} bytes, all as they were written"]
    show(Document("verify", data, [Text("", lines)]), options.json)
    return 0


def verify(directory: Path) -> tuple[int, int]:
    """Check the manifest and every file; returns how many files and bytes. Raises GateError where something differs."""
    from qcompiler.runtime.artifact import open_artifact, verify_files

    artifact = open_artifact(directory)
    return verify_files(artifact), sum(info.bytes for info in artifact.files.values())


def check_files(artifact: Artifact, largest: float = float("inf")) -> None:
    """Compare the files of up to `largest` bytes with their hashes, so that a damaged artifact says so instead of saying
    nonsense. Raises GateError where one differs."""
    from qcompiler.artifact.files import digest
    from qcompiler.artifact.manifest import NAME, check_seal

    check_seal(artifact.path / NAME)
    for name, info in artifact.files.items():
        if info.bytes <= largest and digest(artifact.path / name)["sha256"] != info.sha256.lower():
            raise GateError(f"{artifact.path / name} is damaged: its SHA-256 differs from the manifest's")
