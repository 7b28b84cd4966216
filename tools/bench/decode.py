"""Decode and prefill speed beside stock ONNX Runtime, in one interleaved run.

    ./tools/bench/decode --model reference --model random-0.5b --recipes int4 --work DIR --json decode.json

Each model is compiled to `onnx` (our op library) and to `onnx-stock` (MatMulNBits of an unmodified ONNX Runtime, the
peer) with the same recipe; both run through the same `Session` code. A round opens both in random order and measures
both in random order, and reads the mapped weights, which is the machine's own limit. Ratios are medians over rounds,
each ours against the peer in the same round: only they mean anything on a machine that others use too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.report import tables
from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.tables import Column, Document, Table, Text
from qcompiler.runtime.session import Session
from tools.bench import limit, models
from tools.bench.artifacts import TARGETS, artifact, read_a_token

OURS, PEER = TARGETS
PAUSE = 0.05  # seconds in which the other side's threads stop spinning
WARM_UP = 4  # tokens


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME", help=f"reference, {models.RANDOM}, or a checkpoint [both]")
    parser.add_argument("--recipes", default="int4", metavar="NAME,…", help="[int4]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="inside an operator [all]")
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="rounds [11]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to decode in a round [64]")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens, cut to the context [128]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and the prompt [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps models and artifacts between runs")
    parser.add_argument("--recompile", action="store_true", help="compile even what the work directory has")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    names = chosen.model or ["reference", models.RANDOM]
    with _work(chosen.work) as work:
        cases = [_case(name, recipe, work, chosen) for name in names for recipe in chosen.recipes.split(",")]
    document = _document(cases, chosen)
    if chosen.json:
        chosen.json.write_text(document.to_json() + "\n")
    tables.show(document)
    return 0


@contextlib.contextmanager
def _work(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as folder:
            yield Path(folder)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


# ---- measuring


def _case(name: str, recipe: str, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """One model with one recipe, both targets."""
    source, label = models.source(name, work), Path(name).name
    _tell(f"{label} {recipe}: artifacts")
    sides = {target: artifact(source, label, recipe, target, work, chosen.recompile) for target in TARGETS}
    manifest = json.loads((Path(sides[OURS]["path"]) / "manifest.json").read_text())
    context = manifest["context"]
    prompt = chosen.prompt if context is None else min(chosen.prompt, context - chosen.tokens)
    if prompt < 1:
        raise SystemExit(f"{label}: {chosen.tokens} tokens do not fit its context of {context}")
    order = random.Random(chosen.seed)
    reads = {target: limit.Read(Path(side["path"]) / "model.onnx.data", chosen.threads) for target, side in sides.items()}
    rounds = []
    for index in range(chosen.repeats + 1):
        _tell(f"{label} {recipe}: round {index} of {chosen.repeats}")
        rounds.append(_round(sides, reads, order, prompt, chosen))
    del rounds[0]  # pages come into memory, clocks go up
    measured = {target: _summary([r[target] for r in rounds], sides[target]) for target in TARGETS}
    return {
        "model": label, "recipe": recipe, "parameters": manifest["model"]["parameters"], "prompt_tokens": prompt,
        "sides": measured,
        "ratios": {key: _spread([r[OURS][key] / r[PEER][key] for r in rounds]) for key in ("prefill", "decode", "load")},
        # of the median steps: the least affected by pauses that other programs cause
        "step_ratio": measured[PEER]["step"]["median"] / measured[OURS]["step"]["median"],
        "logits_difference": statistics.median(_difference(r[OURS]["logits"], r[PEER]["logits"]) for r in rounds),
    }  # fmt: skip


def _round(sides: dict, reads: dict[str, limit.Read], order: random.Random, prompt: int, chosen: argparse.Namespace) -> dict:
    result: dict[str, dict[str, Any]] = {}
    sessions: dict[str, Session] = {}
    for target in _shuffled(order):
        start = time.perf_counter()
        sessions[target] = Session(sides[target]["path"], threads=chosen.threads, capacity=prompt + chosen.tokens)
        result[target] = {"load": 1 / (time.perf_counter() - start)}
    tokens = np.random.default_rng(order.getrandbits(32)).integers(0, sessions[OURS].vocabulary, prompt)
    for target in _shuffled(order):
        for _ in range(WARM_UP):
            sessions[target].step(int(tokens[0]))
        time.sleep(PAUSE)
        result[target] |= _run(sessions[target], tokens, chosen.tokens)
    # one machine, one limit: the faster of the two files' reads holds for both
    best = max(reads[target].best() for target in _shuffled(order))
    for target in TARGETS:
        result[target]["limit"] = best
    return result


def _shuffled(order: random.Random) -> list[str]:
    return order.sample(TARGETS, len(TARGETS))


def _run(session: Session, prompt: np.ndarray, new: int) -> dict[str, Any]:
    """Tokens a second of the prompt and of what follows it, seconds of every step, the logits after the prompt."""
    session.reset()
    start = time.perf_counter()
    first = logits = session.prefill(prompt)
    prefill = len(prompt) / (time.perf_counter() - start)
    steps = []
    for _ in range(new):
        token = int(np.argmax(logits))
        start = time.perf_counter()
        logits = session.step(token)
        steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": new / sum(steps), "steps": steps, "logits": np.array(first)}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the peer's logits: both sides compute the same model."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _summary(rounds: list[dict[str, Any]], side: dict[str, Any]) -> dict[str, Any]:
    path = Path(side["path"])
    bytes_a_token = read_a_token(path)
    share = [r["decode"] * bytes_a_token / r["limit"] for r in rounds]
    steps = [1000 * s for r in rounds for s in r["steps"]]
    return {
        "prefill": _spread([r["prefill"] for r in rounds]),
        "decode": _spread([r["decode"] for r in rounds]),
        "step": _spread(steps, keep=False),
        "load_seconds": _spread([1 / r["load"] for r in rounds]),
        "read_bytes_per_second": _spread([r["limit"] for r in rounds]),
        "share_of_read": _spread(share),
        "bytes_a_token": bytes_a_token,
        "file_bytes": sum((path / name).stat().st_size for name in ("model.onnx", "model.onnx.data")),
        "compile": {key: value for key, value in side.items() if key != "path"},
    }


def _spread(samples: list[float], keep: bool = True) -> dict[str, Any]:
    low, median, high = np.percentile(samples, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high} | ({"samples": samples} if keep else {})


# ---- telling


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _document(cases: list[dict[str, Any]], chosen: argparse.Namespace) -> Document:
    machine = {"cpu": cpu_model(), "processors": os.cpu_count(), "load": os.getloadavg()[0], **environment()}
    data = {
        "command": sys.argv[1:], "commit": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain", "-uno")),
        "machine": machine, "threads": chosen.threads, "rounds": chosen.repeats, "tokens": chosen.tokens,
        "limit": limit.DESCRIPTION, "cases": cases,
    }  # fmt: skip
    versions = machine["versions"]
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors (load {machine['load']:.1f}), kernels {machine['isa']}, "
        f"{chosen.threads} threads, onnxruntime {versions['onnxruntime']}, commit {data['commit'][:10]}"
        f"{'+' if data['changed'] else ''}",
        f"medians of {chosen.repeats} interleaved rounds, quartiles in brackets; {chosen.tokens} tokens decoded a round",
        f"limit: {limit.DESCRIPTION}",
        "ratio: ours over onnx-stock in the same round, above 1 we are faster; small models fit into the caches",
    ]
    return Document("bench-decode", data, [Text("", lines), *[_table(case) for case in cases]])


def _table(case: dict[str, Any]) -> Table:
    ours, peer, ratios = case["sides"][OURS], case["sides"][PEER], case["ratios"]
    rows: list[tuple] = []

    def row(what: str, unit: str, key: str, ratio: dict[str, Any] | None, digits: int = 1, factor: float = 1) -> None:
        write = lambda spread: _written(spread, digits, factor)  # noqa: E731
        rows.append((what, unit, write(ours[key]), write(peer[key]), _written(ratio, 2) if ratio else None))

    row("decode", "tokens/s", "decode", ratios["decode"])
    rows.append(("one step", "ms", _written(ours["step"], 2), _written(peer["step"], 2), f"{case['step_ratio']:.2f}"))
    row(f"prompt of {case['prompt_tokens']}", "tokens/s", "prefill", ratios["prefill"], 0)
    row("load", "s", "load_seconds", ratios["load"], 2)
    row("read of the weights", "GB/s", "read_bytes_per_second", None, 1, 1e-9)
    row("decode's share of it", "%", "share_of_read", None, 0, 100)
    megabytes = lambda side, key: f"{side[key] / 1e6:.1f}"  # noqa: E731
    rows.append(("weights a token", "MB", megabytes(ours, "bytes_a_token"), megabytes(peer, "bytes_a_token"), None))
    rows.append(("files", "MB", megabytes(ours, "file_bytes"), megabytes(peer, "file_bytes"), None))
    if ours["compile"].keys() & peer["compile"].keys():
        for what, unit, key, scale in (("compile", "s", "seconds", 1), ("its peak memory", "MB", "peak_bytes", 1e-6)):
            rows.append((what, unit, *(f"{side['compile'][key] * scale:.0f}" for side in (ours, peer)), None))
    columns = (Column(f"{case['model']} {case['recipe']}"), Column("unit"), Column("qcompiler", right=True),
               Column("onnx-stock", right=True), Column("ratio", right=True))  # fmt: skip
    verdict = "ours is faster" if ratios["decode"]["median"] >= 1 else "THE PEER IS FASTER"
    title = f"{case['model']}, {case['parameters']:,} parameters, {case['recipe']}"
    return Table(f"{title}: decode ratio {ratios['decode']['median']:.2f}, {verdict}", columns, rows)


def _written(spread: dict[str, Any], digits: int, factor: float = 1) -> str:
    median, low, high = (f"{factor * spread[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
