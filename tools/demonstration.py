"""The demonstration: the reference model to int8 and int4, a table of what each costs, and a paragraph from the int4 model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from qcompiler.compiler import compile
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.report.progress import make_reporter
from qcompiler.report.tables import Column, Document, Table, decimals, show, size
from qcompiler.runtime.bench import bench
from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session

RECIPES = ("int8", "int4")
PROMPT = "Return a list of"
COLUMNS = (
    Column("model"),
    Column("size", size, right=True),
    Column("bits/weight", decimals(2), right=True),
    Column("perplexity", decimals(2), right=True),
    Column("KL divergence", decimals(4), right=True),
    Column("same top", decimals(3), right=True),
    Column("tokens/s", decimals(0), right=True),
    Column("compile", lambda seconds: f"{seconds:.0f} s", right=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "output", nargs="?", type=Path, default=Path("demo"), help="where the artifacts go (default: ./demo)"
    )
    parser.add_argument("--windows", type=int, default=120, help="evaluation windows (default: 120)")
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    rows = []
    with make_reporter() as reporter:
        for recipe in RECIPES:
            start = time.perf_counter()
            result = compile(
                "reference", output=options.output / recipe, recipe=recipe, overwrite=True, reporter=reporter
            )
            seconds = time.perf_counter() - start
            reporter.stage(f"evaluate {recipe}")
            scores = evaluate(str(result.path), against="reference", max_windows=options.windows, reporter=reporter)
            speed = bench(result.path, prompt_tokens=64, new_tokens=64, repeats=5)
            totals = result.layers["totals"]
            if not rows:
                rows.append(
                    (
                        "reference, float32",
                        4 * result.manifest["model"]["parameters"],
                        32.0,
                        scores["against_perplexity"],
                        0.0,
                        1.0,
                        None,
                        None,
                    )
                )
            rows.append(
                (
                    f"reference, {recipe}",
                    totals["bytes"]["total"],
                    totals["bits_per_weight"],
                    scores["perplexity"],
                    scores["kld_mean"],
                    scores["same_top"],
                    speed["decode_tokens_per_second"]["median"],
                    seconds,
                )
            )
    document = Document("demo", {}, [Table("", COLUMNS, rows)])
    show(document, as_json=False)
    print(f"\nThe int4 model continues {PROMPT!r}:\n\n{PROMPT}", end="")
    session = Session(options.output / "int4")
    for token in generate(session, PROMPT, max_tokens=100, temperature=0.6, top_k=40, seed=2):
        print(token.text, end="", flush=True)
    print(f"\n\nnext: .venv/bin/qcompiler inspect {options.output / 'int4'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
