"""Quantize a model into an artifact: a Hugging Face checkpoint (directory or hub id) in, one directory out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from qcompiler.artifact.manifest import TARGETS
from qcompiler.cli.options import add_device, add_json, byte_count, compile_side, positive, reporter
from qcompiler.errors import InputError, UsageError

NAME = "compile"
HELP = "quantize a model into an artifact"
DEFAULT_RECIPE = "int4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a Hugging Face hub id")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="the artifact to make; must not exist yet")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default=DEFAULT_RECIPE,
        help="built-in recipe or YAML file (default: int4, in groups of 32)",
    )
    parser.add_argument("--target", choices=TARGETS, default="onnx", help="what to make (default: onnx, with our ops)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", nargs="+", action="extend", help="calibration text (default: built in)"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="calibration samples")
    parser.add_argument("--length", type=positive, metavar="L", help="tokens in a calibration sample")
    parser.add_argument("--seed", type=int, metavar="S", help="which windows of the calibration text")
    parser.add_argument(
        "--memory", type=byte_count, metavar="SIZE", help="most memory that calibration may take, e.g. 4GiB (default: no bound)"
    )
    add_device(parser, "where calibration and solvers compute")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the layers that an earlier run with the same output has solved"
    )
    parser.add_argument(
        "--reproducible", action="store_true", help="leave times out of the artifact: equal inputs give equal bytes"
    )
    parser.add_argument(
        "--strict-groups", action="store_true", help="refuse layers whose rows do not divide into groups"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, layer by layer; do nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is already at DIR")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    _check(options)
    recipe = _recipe(options.recipe)
    compiler = compile_side("qcompiler.compiler", NAME)
    from qcompiler.report.compiled import compiled_document, plan_document
    from qcompiler.report.tables import show

    # Only what was asked for: the defaults are the compiler's own.
    given: dict[str, Any] = {"strict_groups": True} if options.strict_groups else {}
    with reporter(options) as progress:
        if options.dry_run:
            plan = compiler.plan(options.model, recipe=recipe, target=options.target, reporter=progress, **given)
            document = plan_document(plan)
        else:
            for key in ("text", "samples", "length", "seed", "memory"):
                if (value := getattr(options, key)) is not None:
                    given[key] = value
            given |= {key: True for key in ("resume", "reproducible") if getattr(options, key)}
            given["device"] = options.device
            result = compiler.compile(
                options.model,
                output=options.output,
                recipe=recipe,
                target=options.target,
                overwrite=options.overwrite,
                reporter=progress,
                **given,
            )
            document = compiled_document(result.path, result.seconds)
    show(document, options.json)
    if not options.dry_run and not options.quiet and sys.stderr.isatty():
        print(f'next: qcompiler run {options.output} "…"', file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported."""
    if options.output is None and not options.dry_run:
        raise UsageError("-o DIR is needed: where to write the artifact (or --dry-run)")
    looks_like_path = os.path.isabs(options.model) or options.model.startswith((".", "~"))
    if looks_like_path and not os.path.exists(options.model):
        raise InputError(f"{options.model}: no such directory")
    for file in options.text or ():
        if not file.is_file():
            raise InputError(f"--text {file}: no such file")
    if options.output is not None:
        from qcompiler.artifact import ArtifactWriter

        source = options.model if os.path.exists(options.model) else None
        ArtifactWriter(options.output, overwrite=options.overwrite, source_dir=source).check()


def _recipe(name: str) -> Any:
    """The recipe, read and checked before the model is."""
    return compile_side("qcompiler.recipe.load", NAME).load(name)
