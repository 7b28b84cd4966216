"""Rank the layers of a language model by what rounding each alone does to its predictions: KL(float ‖ quantized).

With --save-recipe also write a recipe that keeps the most sensitive ones at more bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.options import add_device, add_json, compile_side, positive, reporter
from qcompiler.errors import InputError, UsageError

NAME = "sensitivity"
HELP = "layers ranked by what rounding each alone costs"


def widths(text: str) -> tuple[int, ...]:
    """`8,4,3,2`."""
    return tuple(int(part) for part in text.split(","))


# argparse names the type by its function in messages.
widths.__name__ = "list of widths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, hub id or `reference`")
    parser.add_argument("--bits", type=widths, metavar="B,B…", default=(8, 4, 3, 2), help="widths (default: 8,4,3,2)")
    parser.add_argument(
        "--group", type=int, choices=(0, 32, 64, 128), metavar="G", default=32, help="columns a scale; 0: the row (default: 32)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", nargs="+", action="extend", help="text (default: the built-in calibration text)"
    )
    parser.add_argument("--samples", type=positive, metavar="N", default=8, help="windows of text (default: 8)")
    parser.add_argument("--length", type=positive, metavar="L", help="tokens in a window (default: at most 256)")
    parser.add_argument("--by", type=int, metavar="B", help="order by this width (default: 4)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")
    parser.add_argument("--save-recipe", type=Path, metavar="FILE", help="write a recipe (YAML) that keeps N layers wide")
    parser.add_argument("--keep", type=positive, metavar="N", help="how many layers that recipe keeps")
    parser.add_argument("--keep-bits", type=int, choices=(8, 4, 3), metavar="B", help="at how many bits (default: 8)")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="what it is made from (default: int4); its `allow` holds for the measured graph too"
    )
    add_device(parser, "where the model runs")
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    _check(options)
    module = compile_side("qcompiler.sensitivity", NAME)
    from qcompiler.report.sensitivity import sensitivity_document
    from qcompiler.report.tables import show

    with reporter(options) as progress:
        result = module.sensitivity(
            options.model,
            bits=options.bits,
            group=options.group,
            text=options.text,
            samples=options.samples,
            length=options.length,
            threads=options.threads,
            device=options.device,
            base=options.recipe,
            keep=options.keep,
            keep_bits=options.keep_bits or 8,
            reporter=progress,
        )
    if options.save_recipe is not None:
        _save(options.save_recipe, result["recipe"])
    show(sensitivity_document(result, options.by, options.save_recipe and str(options.save_recipe)), options.json)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported."""
    if (options.save_recipe is None) != (options.keep is None):
        raise UsageError("--save-recipe FILE and --keep N belong together: where the recipe goes, and how many layers it keeps")
    if options.save_recipe is None and options.keep_bits is not None:
        raise UsageError("--keep-bits describes the recipe to save; give --save-recipe FILE and --keep N with it")
    if options.by is not None and options.by not in options.bits:
        raise UsageError(f"--by {options.by}: not among the measured widths ({', '.join(map(str, options.bits))})")
    for file in options.text or ():
        if not file.is_file():
            raise InputError(f"--text {file}: no such file")
    if options.save_recipe is not None:
        if options.save_recipe.exists():
            raise InputError(f"--save-recipe {options.save_recipe}: is there already; choose another name or remove it")
        if not options.save_recipe.parent.is_dir():
            raise InputError(f"--save-recipe {options.save_recipe}: there is no directory {options.save_recipe.parent}")


def _save(path: Path, recipe: dict) -> None:
    from qcompiler.recipe import parse, to_yaml

    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(to_yaml(parse(recipe, recipe["name"])))
    except FileExistsError as error:
        raise InputError(f"--save-recipe {path}: is there already; choose another name or remove it") from error
