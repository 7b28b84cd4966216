"""Convert an artifact to this version's packed layout. Layout 1 is the only one so far: verifies and copies."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qcompiler.errors import UnsupportedError

NAME = "repack"
HELP = "convert an artifact to this version's packed layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR2", required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is already there")


def execute(options: argparse.Namespace) -> int:
    from qcompiler.artifact import ArtifactWriter
    from qcompiler.artifact.manifest import NAME as MANIFEST
    from qcompiler.artifact.manifest import SEAL
    from qcompiler.cli.verify import verify
    from qcompiler.ops.formats import LAYOUT_VERSION

    with ArtifactWriter(options.output, overwrite=options.overwrite, source_dir=options.directory) as writer:
        _, size = verify(options.directory)
        manifest = json.loads((options.directory / MANIFEST).read_bytes())
        if manifest.get("layout_version") != LAYOUT_VERSION:
            raise UnsupportedError(
                f"{options.directory} has packed layout {manifest.get('layout_version')!r}; "
                f"this version knows {LAYOUT_VERSION} only"
            )
        writer.reserve(size)
        for name in manifest["files"]:
            writer.add_file(options.directory / name, name)
        writer.set_manifest({key: value for key, value in manifest.items() if key not in ("files", SEAL)})
    if not options.quiet:
        print(f"layout {LAYOUT_VERSION} is the newest there is: verified and copied unchanged", file=sys.stderr)
    print(options.output)
    return 0
