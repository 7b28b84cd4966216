"""Measure a model or an artifact on text: perplexity, and with --against the divergence from another model.

Models without a language-model head: cosine similarity, SQNR and maximum error of the output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.options import add_device, add_dtype, add_json, positive, reporter
from qcompiler.errors import InputError

NAME = "eval"
HELP = "perplexity, and divergence from another model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DIR|MODEL", help="an artifact, a checkpoint directory or a hub id")
    parser.add_argument("--against", metavar="MODEL", help="the model to compare with: same text, same windows")
    parser.add_argument("--text", type=Path, metavar="FILE", help="evaluation text (default: built in)")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens in a window")
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens from one window to the next")
    parser.add_argument("--max-windows", type=positive, metavar="N", help="stop after so many windows")
    add_device(parser, "where to run models, and artifacts of target torch")
    add_dtype(parser)
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    if options.text is not None and not options.text.is_file():
        raise InputError(f"--text {options.text}: no such file")
    from qcompiler.artifact.manifest import NAME as MANIFEST
    from qcompiler.cli.verify import check_files
    from qcompiler.evaluate import evaluate
    from qcompiler.report.evaluated import evaluated_document
    from qcompiler.report.tables import show
    from qcompiler.runtime.artifact import open_artifact

    for source in (options.target, options.against):
        # Figures of a damaged artifact would be believed.
        if source is not None and (Path(source) / MANIFEST).is_file():
            check_files(open_artifact(Path(source)))
    with reporter(options) as progress:
        result = evaluate(
            options.target,
            against=options.against,
            text=options.text,
            context=options.context,
            stride=options.stride,
            max_windows=options.max_windows,
            reporter=progress,
            device=options.device,
            dtype=options.dtype,
        )
    show(evaluated_document(result), options.json)
    return 0
