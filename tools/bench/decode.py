"""Decode and prefill speed, load time and memory of several recipes beside the peers, in one interleaved run.

    ./tools/bench/decode --model random-0.5b --recipes int4,int8,vq3,vq2 --work DIR --json decode.json

Each model is compiled with every recipe, and made for every peer that is installed: ONNX Runtime with its own kernels, GenAI
on the same, OpenVINO, llama.cpp. Every side has a process of its own. In a round each in turn, in random order, opens its
model, runs and closes it, so that none has threads that spin or memory that counts while another is measured; then the
weights' pages are read, which is the machine's own limit. Ratios are medians over rounds, each against another side in the
same round: only they mean anything on a machine that others use too. Models with random weights are rounded to nearest,
whatever the recipe says: nobody's speed depends on how codes were found. docs/decode_benchmarks.md tells how to install peers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.report import tables
from tools.bench import decode_sides, models
from tools.bench.decode_engines import Skip
from tools.bench.decode_limit import Read
from tools.bench.decode_process import WARM_UP, SideError, Worker, processor_seconds
from tools.bench.decode_sides import PEERS, Side
from tools.bench.decode_table import RATES, document, spread

RECIPES = "int4,int8,vq3,vq2"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"reference, {', '.join(models.SHAPES)}, or a checkpoint [{models.RANDOM}]"
    parser.add_argument("--model", action="append", metavar="NAME", help=names)
    parser.add_argument("--recipes", default=RECIPES, metavar="NAME,…", help="ratios are against the first too [%(default)s]")
    parser.add_argument("--peers", default=PEERS, metavar="KIND:WHAT,…", help="or none [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="that compute [all]")
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="rounds [11]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to decode in a round [64]")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens, cut to the context [512]")
    parser.add_argument("--past", type=int, default=16, metavar="N", help="tokens before the first that is decoded [16]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and the prompt [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps models and artifacts between runs")
    parser.add_argument("--recompile", action="store_true", help="make even what the work directory has")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    with _work(chosen.work) as work:
        cases = [case(name, work, chosen) for name in chosen.model or [models.RANDOM]]
    shown = document(cases, chosen)
    if chosen.json:
        chosen.json.write_text(shown.to_json() + "\n")
    tables.show(shown)
    return 0


@contextlib.contextmanager
def _work(given: Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as folder:
            yield Path(folder)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


def case(name: str, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """One model with every recipe and every peer."""
    source, label, rounded = models.source(name, work), Path(name).name, name in models.SHAPES
    own = decode_sides.ours(source, label, chosen.recipes.split(","), work, chosen.recompile, rounded)
    names = [] if chosen.peers == "none" else chosen.peers.split(",")
    others, skipped = decode_sides.peers(source, label, names, work, chosen.recompile, rounded)
    manifest = json.loads((Path(own[0].path) / "manifest.json").read_text())
    prompt = chosen.prompt if (context := manifest["context"]) is None else min(chosen.prompt, context)
    if prompt < WARM_UP or (context is not None and chosen.past + chosen.tokens > context):
        raise SystemExit(f"{label}: {chosen.past} + {chosen.tokens} tokens do not fit its context of {context}")
    vocabulary = next(info for info in manifest["outputs"] if info["role"] == "logits")["shape"][-1]
    order = random.Random(chosen.seed)

    known = decode_sides.reference(source, label, work)
    sides: dict[str, Side] = {}
    examined = {}
    for side in [*own, *others]:
        _tell(f"{label} {side.name}: logits and memory")
        try:
            examined[side.name] = decode_sides.examined(side, known, _text(order, vocabulary, prompt), chosen.threads)
            sides[side.name] = side
        except Skip as reason:
            skipped[side.name] = str(reason)

    rounds = []
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(side.kind, chosen.threads)) for name, side in sides.items()}
        reads = {name: Read(side.data, chosen.threads) for name, side in sides.items()}
        for index in range(chosen.repeats + 1):
            _tell(f"{label}: round {index} of {chosen.repeats}")
            rounds.append(round_of(sides, workers, reads, order, _text(order, vocabulary, prompt), chosen.past, chosen.tokens))
    del rounds[0]  # pages come into memory, clocks go up
    mine, theirs = [side.name for side in own], [side.name for side in others if side.name in sides]
    return {
        "model": label, "parameters": manifest["model"]["parameters"], "prompt_tokens": prompt, "ours": mine, "peers": theirs,
        "skipped": skipped, "sides": summaries(rounds, sides, [mine[0], *theirs], examined),
        "read_bytes_per_second": spread([limit for r in rounds for limit in r["limits"].values()]),
        # of the processors, by all others together while one side was measured: what spins, or lives on, shows here
        "idle_share": max(r["sides"][name]["idle_share"] for r in rounds for name in sides),
    }  # fmt: skip


def _text(order: random.Random, vocabulary: int, length: int) -> np.ndarray:
    return np.random.default_rng(order.getrandbits(32)).integers(0, vocabulary, length)


def round_of(
    sides: dict[str, Side],
    workers: dict[str, Worker],
    reads: dict[str, Read],
    order: random.Random,
    tokens: np.ndarray,
    past: int,
    new: int,
) -> dict[str, Any]:
    """Every side once: `prefill`, `decode` and `load`, each the higher the better, and its `steps`.

    `busy` and `idle_share` are the processors that its process and all others used meanwhile.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in order.sample(list(sides), len(sides)):
        worker = workers[name]
        try:
            load = 1 / worker.open(sides[name].path, max(len(tokens), past + new))
            before = {other.pid: processor_seconds(other.pid) for other in workers.values()}
            start = time.perf_counter()
            result = worker.run(tokens, past, new)
            taken = time.perf_counter() - start
            used = {pid: processor_seconds(pid) - seconds for pid, seconds in before.items()}
            worker.close()
        except SideError as error:
            raise SystemExit(f"{name}: {error}") from error
        busy = used.pop(worker.pid) / taken
        found[name] = {**result, "load": load, "busy": busy, "idle_share": sum(used.values()) / taken}
    return {"sides": found, "limits": {name: read.best() for name, read in reads.items()}}


def summaries(
    rounds: list[dict[str, Any]], sides: dict[str, Side], bases: list[str], examined: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Medians and quartiles of every side, and its ratios to each of `bases` in the same rounds."""
    result = {}
    for name, side in sides.items():
        own = [r["sides"][name] for r in rounds]
        read = side.facts["bytes_a_token"]
        result[name] = {
            "kind": side.kind, "variant": side.variant, **examined[name],
            "prefill": spread([r["prefill"] for r in own]),
            "decode": spread([r["decode"] for r in own]),
            "step": spread([1000 * step for r in own for step in r["steps"]], keep=False),
            "busy": spread([r["busy"] for r in own]),
            "load_seconds": spread([1 / r["load"] for r in own]),
            "share_of_read": spread([r["sides"][name]["decode"] * read / r["limits"][name] for r in rounds]),
            "bytes_a_token": read,
            "file_bytes": side.facts["file_bytes"],
            "made": {key: value for key, value in side.facts.items() if key != "path"},
            "ratios": {
                base: {key: spread([r["sides"][name][key] / r["sides"][base][key] for r in rounds]) for key in RATES}
                for base in bases
            },
        }  # fmt: skip
        # of the median steps: the least affected by pauses that other programs cause
        for base, ratios in result[name]["ratios"].items():
            other = [step for r in rounds for step in r["sides"][base]["steps"]]
            ratios["step"] = 1e3 * float(np.median(other)) / result[name]["step"]["median"]
    return result


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
