"""What each method gains over its baseline at equal bits, over several draws of calibration text.

Every variant is compiled as a user would compile it and run in ONNX Runtime over the same evaluation windows. A gain is the
mean over windows (and seeds) of the paired difference of KL(float ‖ quantized), with its standard error over windows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler
from qcompiler.evaluate.evaluation import Plan, evaluation_source, plan_windows, run_window
from qcompiler.evaluate.metrics import token_divergence, token_nll
from qcompiler.evaluate.targets import Target, open_target
from qcompiler.evaluate.windows import Window
from qcompiler.report.progress import make_reporter
from tools.bench import accuracy_vq
from tools.bench.accuracy_variants import (
    Claim,
    Variant,
    claims,
    distillation_variants,
    sensitivity_variants,
    static_variants,
    weight_variants,
)

SAMPLES, LENGTH = 128, 256


@dataclass
class Measured:
    """A variant's figures over the windows: nats a token, one row a seed."""

    klds: list[np.ndarray] = field(default_factory=list)
    losses: list[np.ndarray] = field(default_factory=list)  # cross entropy, less the float model's
    ratios: list[float] = field(default_factory=list)
    same_top: list[float] = field(default_factory=list)
    bits: float = 0.0

    @property
    def kld(self) -> float:
        return float(np.mean([row.mean() for row in self.klds]))


SECTIONS = ("weights", "static", "distillation", "sensitivity", "vq", "ablations", "head")


def variants(section: str, model: str) -> list[Variant]:
    """The variants of a section."""
    if section == "weights":
        return [variant for bits in (4, 3) for group in (32, 128) for variant in weight_variants(bits, group)]
    if section == "static":
        return list(static_variants())
    if section == "vq":
        return list(accuracy_vq.vq_variants())
    if section == "head":
        return list(accuracy_vq.head_variants())
    if section == "ablations":
        return [variant for format in ("vq2", "vq3") for variant in accuracy_vq.ablation_variants(format)]
    return list(distillation_variants() if section == "distillation" else sensitivity_variants(model))


def calibration_files(name: str) -> list[str] | None:
    """The files of a calibration text: None for the default, `stdlib` for sources of the Python that runs this."""
    if name == "topics":
        return None
    if name == "stdlib":
        return [str(path) for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    return name.split(",")


def measure(model: str, chosen: list[Variant], seeds: list[int], options: argparse.Namespace) -> dict[str, Measured]:
    """Compile and run every variant with every seed; the float model's predictions are computed once."""
    results = {variant.name: Measured() for variant in chosen}
    with tempfile.TemporaryDirectory(prefix="qcompiler-accuracy-") as folder, make_reporter(options.quiet) as reporter:
        reference = open_target(model, options.threads)
        plan = plan_windows([reference], evaluation_source(None, options.windows), None, None, options.windows, None)
        logits = np.lib.format.open_memmap(Path(folder) / "float.npy", "w+", np.float32, _shape(reference, plan))
        expected: list[np.ndarray] = []
        start = 0
        for window in plan.windows:
            rows = window.scored(run_window(reference, window)["logits"])
            logits[start : start + len(rows)] = rows
            expected.append(logits[start : start + len(rows)])
            start += len(rows)
        for variant in chosen:
            for seed in seeds if variant.calibrated else seeds[:1]:
                reporter.stage(f"{variant.name}, seed {seed}")
                output = Path(folder) / "artifact"
                compiled = qcompiler.compile(
                    model, output=output, recipe=variant.recipe, samples=options.samples, length=LENGTH, seed=seed,
                    text=calibration_files(options.calibration), overwrite=True,
                )
                _score(results[variant.name], open_target(output, options.threads), plan.windows, expected)
                results[variant.name].bits = compiled.layers["totals"]["bits_per_weight"]
                found = results[variant.name]
                reporter.note(f"{variant.name}, seed {seed}: KL {found.klds[-1].mean():.5f}, ratio {found.ratios[-1]:.4f}")
    return results


def _shape(reference: Target, plan: Plan) -> tuple[int, int]:
    width = run_window(reference, plan.windows[0])["logits"].shape[-1]
    return sum(window.last - window.first for window in plan.windows), width


def _score(found: Measured, target: Target, windows: list[Window], expected: list[np.ndarray]) -> None:
    klds, same, losses = [], [], []
    for window, theirs in zip(windows, expected, strict=True):
        ours = window.scored(run_window(target, window)["logits"])
        kld, top = token_divergence(theirs, ours)
        klds.append(kld.mean())
        same.append(np.mean(top))
        losses.append(np.mean(token_nll(ours, window.labels) - token_nll(theirs, window.labels)))
    found.klds.append(np.array(klds))
    found.losses.append(np.array(losses))
    found.same_top.append(float(np.mean(same)))
    found.ratios.append(float(np.exp(np.mean(losses))))


def judge(claim: Claim, results: dict[str, Measured]) -> dict[str, Any]:
    """The paired gain of a claim, and whether it holds by more than two standard errors."""
    base, better = results[claim.base], results[claim.better]
    seeds = max(len(base.klds), len(better.klds))
    pick = lambda rows, i: rows[i] if len(rows) > 1 else rows[0]  # noqa: E731
    gains = np.mean([claim.most * pick(base.klds, i) - pick(better.klds, i) for i in range(seeds)], axis=0)
    mean, error = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
    losses = np.mean([pick(base.losses, i) - pick(better.losses, i) for i in range(seeds)], axis=0)
    nats = {"nats": float(losses.mean()), "nats_error": float(losses.std(ddof=1) / np.sqrt(len(losses)))}
    return {**nats,
        "base": claim.base, "better": claim.better, "asked": claim.most, "reached": better.kld / base.kld,
        "gain": mean, "standard_error": error, "holds": mean > 2 * error,
    }  # fmt: skip


def table(results: dict[str, Measured], judged: list[dict[str, Any]]) -> str:
    """Markdown: figures of every variant, then every claim."""
    lines = ["| variant | bits per weight | perplexity ratio | KL, nats | same top |", "|---|---|---|---|---|"]
    for name, found in results.items():
        spread = f" ± {np.std([row.mean() for row in found.klds], ddof=1):.5f}" if len(found.klds) > 1 else ""
        ratio, same_top = np.mean(found.ratios), np.mean(found.same_top)
        lines.append(f"| {name} | {found.bits:.3f} | {ratio:.4f} | {found.kld:.5f}{spread} | {same_top:.4f} |")
    columns = ("better", "base", "KL ratio", "asked", "paired gain", "holds", "gain in cross entropy")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in judged:
        gain = f"{row['gain']:+.5f} ± {row['standard_error']:.5f}"
        word = "yes" if row["holds"] else "no"
        lines.append(f"| {row['better']} | {row['base']} | {row['reached']:.3f} | < {row['asked']:g} | {gain} | {word} | "
                     f"{row['nats']:+.5f} ± {row['nats_error']:.5f} |")
    return "\n".join(lines)


def _earlier(files: list[Path], settings: dict[str, Any]) -> dict[str, Measured]:
    """What earlier runs with the same settings measured."""
    found: dict[str, Measured] = {}
    for path in files:
        document = json.loads(path.read_text())
        if document.get("settings") != settings:
            raise SystemExit(f"{path}: measured with {document.get('settings')}, and now it is {settings}")
        for name, row in document["variants"].items():
            klds, losses = ([np.array(values) for values in row[key]] for key in ("klds", "losses"))
            found[name] = Measured(klds, losses, row["ratios"], row["same_top"], row["bits"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench/accuracy", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--model", default="reference", help="checkpoint directory (default: reference)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration windows (default: 3)")
    samples = f"calibration windows of {LENGTH} tokens (default: {SAMPLES})"
    parser.add_argument("--samples", type=int, default=SAMPLES, help=samples)
    parser.add_argument("--calibration", default="topics", metavar="TEXT", help="topics: first two thirds of pydoc_data.topics, "
                        "whose last third is evaluated; stdlib: sources of Python's own library; or files (default: topics)")
    parser.add_argument("--windows", type=int, help="evaluation windows (default: the whole text)")
    parser.add_argument("--only", metavar="WORD", help="variants whose name holds this word")
    parser.add_argument("--without", metavar="WORD", help="no variants whose name holds this word")
    parser.add_argument("--results", type=Path, nargs="*", default=[], metavar="FILE", help="what --json wrote with the same "
                        "settings: its variants are not measured again")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    sections = options.sections or list(SECTIONS)
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    chosen = [v for s in sections for v in variants(s, options.model) if not options.only or options.only in v.name]
    chosen = [variant for variant in chosen if not options.without or options.without not in variant.name]
    settings = {name: getattr(options, name) for name in ("model", "seeds", "samples", "windows", "calibration")}
    results = _earlier(options.results, settings)
    chosen = [variant for variant in chosen if variant.name not in results]
    results |= measure(options.model, chosen, list(range(options.seeds)), options) if chosen else {}
    judged = [judge(c, results) for c in [*claims(), *accuracy_vq.vq_claims()] if c.base in results and c.better in results]
    print(table(results, judged))
    if options.json:
        figures = {
            name: {
                "bits": m.bits, "kld": m.kld, "ratios": m.ratios, "same_top": m.same_top,
                "klds": [r.tolist() for r in m.klds], "losses": [r.tolist() for r in m.losses],
            }
            for name, m in results.items()
        }
        document = {"schema": 1, "settings": settings, "variants": figures, "claims": judged}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row["holds"] for row in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
