"""Decode and prefill speed of several recipes beside stock ONNX Runtime, in one interleaved run.

    ./tools/bench/decode --model reference --model random-0.5b --recipes int4,vq3,vq2 --work DIR --json decode.json

Each model is compiled to `onnx` (our op library) with every recipe, and to `onnx-stock` (MatMulNBits of an unmodified ONNX
Runtime, the peer) with one; all run through the same `Session` code. A round opens all in random order and measures all in
random order, and reads the mapped weights, which is the machine's own limit. Ratios are medians over rounds, each against
the first recipe, or the peer, in the same round: only they mean anything on a machine that others use too. Models with
random weights are rounded to nearest, whatever the recipe says: nobody's speed depends on how codes were found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
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
    names = f"reference, {', '.join(models.SHAPES)}, or a checkpoint [reference, {models.RANDOM}]"
    parser.add_argument("--model", action="append", metavar="NAME", help=names)
    parser.add_argument("--recipes", default="int4", metavar="NAME,…", help="ratios are against the first [int4]")
    parser.add_argument("--peer", default="int4", metavar="NAME", help="recipe of the peer [int4]")
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
        cases = [_case(name, work, chosen) for name in names]
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


def _case(name: str, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """One model with every recipe, and its peer."""
    source, label = models.source(name, work), Path(name).name
    recipes = chosen.recipes.split(",")
    wanted = {recipe: (recipe, OURS) for recipe in recipes} | {f"{PEER} {chosen.peer}": (chosen.peer, PEER)}
    sides = {}
    for side, (recipe, target) in wanted.items():
        _tell(f"{label} {side}: artifact")
        sides[side] = artifact(source, label, recipe, target, work, chosen.recompile, rounded=name in models.SHAPES)
    first, *_, peer = sides
    manifest = json.loads((Path(sides[first]["path"]) / "manifest.json").read_text())
    context = manifest["context"]
    prompt = chosen.prompt if context is None else min(chosen.prompt, context - chosen.tokens)
    if prompt < 1:
        raise SystemExit(f"{label}: {chosen.tokens} tokens do not fit its context of {context}")
    order = random.Random(chosen.seed)
    reads = {side: limit.Read(Path(found["path"]) / "model.onnx.data", chosen.threads) for side, found in sides.items()}
    rounds = []
    for index in range(chosen.repeats + 1):
        _tell(f"{label}: round {index} of {chosen.repeats}")
        rounds.append(_round(sides, reads, order, prompt, chosen))
    del rounds[0]  # pages come into memory, clocks go up
    measured = {side: _summary([r[side] for r in rounds], found) for side, found in sides.items()}
    for side, found in measured.items():
        found["ratios"] = {
            what: {key: _spread([r[side][key] / r[base][key] for r in rounds]) for key in ("prefill", "decode", "load")}
            for what, base in (("first", first), ("peer", peer))
        }
        # of the median steps: the least affected by pauses that other programs cause
        found["step_ratio"] = measured[peer]["step"]["median"] / found["step"]["median"]
    return {
        "model": label, "recipes": recipes, "parameters": manifest["model"]["parameters"], "prompt_tokens": prompt,
        "first": first, "peer": peer, "sides": measured,
    }  # fmt: skip


def _round(sides: dict, reads: dict[str, limit.Read], order: random.Random, prompt: int, chosen: argparse.Namespace) -> dict:
    result: dict[str, dict[str, Any]] = {}
    sessions: dict[str, Session] = {}
    for side in _shuffled(order, sides):
        start = time.perf_counter()
        sessions[side] = Session(sides[side]["path"], threads=chosen.threads, capacity=prompt + chosen.tokens)
        result[side] = {"load": 1 / (time.perf_counter() - start)}
    vocabulary = next(iter(sessions.values())).vocabulary
    tokens = np.random.default_rng(order.getrandbits(32)).integers(0, vocabulary, prompt)
    for side in _shuffled(order, sides):
        for _ in range(WARM_UP):
            sessions[side].step(int(tokens[0]))
        time.sleep(PAUSE)
        result[side] |= _run(sessions[side], tokens, chosen.tokens)
    # one machine, one limit: the fastest of the files' reads holds for all
    best = max(reads[side].best() for side in _shuffled(order, sides))
    for side in sides:
        result[side]["limit"] = best
    return result


def _shuffled(order: random.Random, sides: dict) -> list[str]:
    return order.sample(list(sides), len(sides))


def _run(session: Session, prompt: np.ndarray, new: int) -> dict[str, Any]:
    """Tokens a second of the prompt and of what follows it, seconds of every step."""
    session.reset()
    start = time.perf_counter()
    logits = session.prefill(prompt)
    prefill = len(prompt) / (time.perf_counter() - start)
    steps = []
    for _ in range(new):
        token = int(np.argmax(logits))
        start = time.perf_counter()
        logits = session.step(token)
        steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": new / sum(steps), "steps": steps}


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
        "ratios: in the same round, above 1 the row is faster; small models fit into the caches",
    ]
    return Document("bench-decode", data, [Text("", lines), *[_table(case) for case in cases]])


def _table(case: dict[str, Any]) -> Table:
    """One row a side."""
    rows: list[tuple] = []
    for side, found in case["sides"].items():
        first, peer, compiled = found["ratios"]["first"], found["ratios"]["peer"], found["compile"]
        rows.append((
            side, _written(found["decode"], 1), _written(first["decode"], 2), _written(peer["decode"], 2),
            _written(found["step"], 2), _written(found["prefill"], 0), _written(peer["prefill"], 2),
            _written(found["load_seconds"], 2), f"{100 * found['share_of_read']['median']:.0f}",
            f"{found['bytes_a_token'] / 1e6:.1f}", f"{found['file_bytes'] / 1e6:.1f}",
            f"{compiled['seconds']:.0f}" if "seconds" in compiled else None,
            f"{compiled['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in compiled else None,
        ))  # fmt: skip
    names = (
        "decode, tokens/s", f"/ {case['first']}", f"/ {case['peer']}", "step, ms", f"prompt of {case['prompt_tokens']}, tokens/s",
        f"/ {case['peer']}", "load, s", "% of read", "MB a token", "files, MB", "compile, s", "its peak, MB",
    )  # fmt: skip
    columns = (Column(case["model"]), *(Column(name, right=True) for name in names))
    ratio = case["sides"][case["first"]]["ratios"]["peer"]["decode"]["median"]
    verdict = f"{case['first']} / {case['peer']} {ratio:.2f}, {'ours is faster' if ratio >= 1 else 'THE PEER IS FASTER'}"
    for recipe in case["recipes"][1:]:
        ratio = case["sides"][recipe]["ratios"]["first"]["decode"]["median"]
        verdict += f"; {recipe} / {case['first']} {ratio:.2f}"
    read = next(iter(case["sides"].values()))["read_bytes_per_second"]
    title = f"{case['model']}, {case['parameters']:,} parameters (read limit {_written(read, 1, 1e-9)} GB/s): decode {verdict}"
    return Table(title, columns, rows)


def _written(spread: dict[str, Any], digits: int, factor: float = 1) -> str:
    median, low, high = (f"{factor * spread[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
