"""Speed of matmul kernels in one interleaved run: ours in every format, the machine's limits, other programs' kernels.

    ./tools/bench/kernels --json kernels.json --csv kernels.csv
    ./tools/bench/kernels --formats int4-g32,vq2 --peers none --rows 1 --threads 2 --rounds 3
    ./tools/bench/kernels --resident --isas all

A walk multiplies the same activations with many matrices in turn, `--megabytes` of weights in every format, so that none is in
the cache when its turn comes; `--resident` takes few small matrices that stay there. A round gives every side a slice of time,
in random order. Ratios and shares of the limits are within a round; medians and quartiles are over rounds: only they mean
anything on a machine that others use too. docs/kernel_benchmarks.md says what each side computes.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from qcompiler.errors import UsageError
from qcompiler.ops.formats import Activation
from qcompiler.runtime import library
from tools.bench import kernel_peers, kernels_report
from tools.bench.command import Keep, names, numbers, shapes, tell
from tools.bench.command import run as run_command
from tools.bench.kernels_limit import Limits
from tools.bench.kernels_ours import FORMATS, Ours, Weights
from tools.bench.kernels_side import TOLERANCE, Case, Opened, Side, Skipped

PAUSE = 0.02  # seconds in which the other side's threads stop spinning
DECODE_ROWS = 16  # more rows are a prefill: two matrices, however small, are enough for what computes
PREFILL_MATRICES = 2
LIMIT_SLICE = 0.03  # seconds of each read loop
SIDES_A_LIMIT = 12  # sides for which the limits are measured once
ACTIVATIONS = {"int8-block": Activation.INT8_BLOCK, "int8-token": Activation.INT8_TOKEN, "float": Activation.FLOAT}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="NAME,…", help="ours, or none [all]")
    kinds, programs = ", ".join(ACTIVATIONS), ", ".join(kernel_peers.FAMILIES)
    parser.add_argument("--activations", default="int8-block", metavar="NAME,…", help=f"of ours: {kinds} [int8-block]")
    parser.add_argument("--isas", default="", metavar="NAME,…", help="of ours: all, or some that this CPU runs [the one in use]")
    parser.add_argument("--peers", default="all", metavar="NAME,…", help=f"none, all, some sides, or some of {programs} [all]")
    parser.add_argument("--rows", default="1,4,128,512", metavar="N,…", help="of the activations [1,4,128,512]")
    parser.add_argument("--threads", default="1,2", metavar="N,…", help="[1,2]")
    parser.add_argument("--shape", metavar="NxK", help="outputs x inputs of a matrix [4096x4096; resident: 1024x1024]")
    parser.add_argument("--megabytes", type=float, metavar="N", help="of weights that a walk reads [256; resident: 4]")
    parser.add_argument("--resident", action="store_true", help="few small matrices that stay in the cache")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="[7]")
    parser.add_argument("--slice", type=float, default=0.15, metavar="S", help="seconds of a side in a round [0.15]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order [0]")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the weights' file lies while it runs [temporary]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where the table goes too, a line a side")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    return run_command(
        "kernels", arguments, lambda keep: run(chosen, keep), kernels_report.document, chosen.json,
        [(chosen.csv, kernels_report.write_csv)],
    )  # fmt: skip


def run(chosen: argparse.Namespace, keep: Keep = lambda results: None) -> dict[str, Any]:
    """Everything measured: a list of settings (threads and rows), each with its limits and sides, and what was skipped."""
    load = os.getloadavg()[0]
    ((n, k), *more) = shapes("shape", chosen.shape or ("1024x1024" if chosen.resident else "4096x4096"))
    if more:
        raise UsageError(f"--shape is {chosen.shape!r}, expected one")
    megabytes = chosen.megabytes if chosen.megabytes is not None else 4 if chosen.resident else 256
    formats = names("format", chosen.formats, FORMATS)
    rows, threads = (numbers(name, getattr(chosen, name)) for name in ("rows", "threads"))
    if chosen.rounds < 1:
        raise UsageError(f"--rounds is {chosen.rounds}, expected at least 1")
    peers = kernel_peers.sides(chosen.peers)
    first = Case(n, k, rows[0], threads[0], int(1e6 * megabytes))
    tell(f"weights: a file for {len(formats)} formats, matrices of {n} x {k}")
    weights = Weights(first, [FORMATS[name] for name in formats] or [FORMATS["int8"]], chosen.work)
    sides: list[Side] = [
        Ours(name, weights, activation, isa)
        for name in formats
        for activation in (ACTIVATIONS[a] for a in names("kind of activations", chosen.activations, ACTIVATIONS))
        for isa in _isas(chosen.isas)
    ]
    if not sides and not peers:
        raise UsageError("nothing to measure: --formats and --peers are both none")
    order = random.Random(chosen.seed)
    settings: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    results = {
        "shape": [n, k], "megabytes": megabytes, "resident": chosen.resident, "rounds": chosen.rounds, "slice": chosen.slice,
        "load_before": load, "skipped": skipped, "settings": settings,
    }  # fmt: skip
    for count in threads:
        limits = Limits(weights.address, max(64, weights.codes_bytes), count)
        for row in rows:
            tell(f"setting {len(settings) + 1} of {len(threads) * len(rows)}")
            case = Case(n, k, row, count, first.weight_bytes, PREFILL_MATRICES if row > DECODE_ROWS else None)
            settings.append(_setting(case, [*sides, *peers], limits, order, skipped, chosen))
            keep(results)
    return results


# ---- measuring


def _setting(
    case: Case, sides: list[Side], limits: Limits, order: random.Random, skipped: dict[str, str], chosen: argparse.Namespace
) -> dict[str, Any]:
    """One number of threads and of rows: all sides opened and checked, then measured in rounds."""
    title = kernels_report.heading({"threads": case.threads, "rows": case.rows})
    opened: dict[str, Opened] = {}
    errors: dict[str, float] = {}
    families: dict[str, str] = {}
    try:
        for side in sides:
            if side.name in skipped:
                continue
            tell(f"{title}: {side.name}")
            try:
                if side.family != "ours":
                    _need_memory(case)
                ready = side.open(case)
            except Skipped as reason:
                skipped[side.name] = str(reason)
                tell(f"  skipped: {reason}")
                continue
            opened[side.name], families[side.name] = ready, side.family
            errors[side.name] = ready.error()
            if not errors[side.name] <= TOLERANCE:
                off = f"its product is off by {errors[side.name]:.2g} of the float product of its own weights"
                skipped[side.name] = f"{off}, expected at most {TOLERANCE}"
                tell(f"  skipped: {skipped[side.name]}")
                opened.pop(side.name).close()
        rounds = []
        for index in range(chosen.rounds + 1):
            tell(f"{title}: round {index} of {chosen.rounds}")
            rounds.append(_round(opened, limits, order, 0 if index == 0 else chosen.slice, case.rows <= DECODE_ROWS))
        del rounds[0]  # pages come into memory, clocks go up
        found = {
            name: {
                "family": families[name], "matrices": ready.matrices, "matrix_bytes": ready.matrix_bytes, "error": errors[name],
                "walks": [r["sides"][name] for r in rounds],
            }
            for name, ready in opened.items()
        }  # fmt: skip
    finally:
        for ready in opened.values():
            ready.close()
    return kernels_report.setting(case, found, [r["read"] for r in rounds], [r["dot"] for r in rounds], limits.dot)


def _round(opened: dict[str, Opened], limits: Limits, order: random.Random, seconds: float, warm: bool) -> dict[str, Any]:
    """Walks a second of every side, bytes a second of every read loop, int8 operations a second."""
    walks: dict[str, float] = {}
    reads = limits.reads()
    read: dict[str, list[float]] = {loop: [] for loop in reads}
    operations, dot = limits.compute(), []
    # The limits stand among the sides, often enough that a machine which slows down slows both.
    stops = [None] * (1 + len(opened) // SIDES_A_LIMIT)
    for what in order.sample([*opened, *stops], len(opened) + len(stops)):
        time.sleep(PAUSE)
        if what is not None:
            walks[what] = _rate(opened[what].walk, seconds, warm)
            continue
        for loop in order.sample(list(reads), len(reads)):
            read[loop].append(limits.size * _rate(reads[loop], min(seconds, LIMIT_SLICE), warm=True))
        dot.append(operations * _rate(limits.compute, min(seconds, LIMIT_SLICE), warm=True))
    return {"sides": walks, "read": {loop: fmean(rates) for loop, rates in read.items()}, "dot": fmean(dot)}


def _rate(act: Callable[[], Any], seconds: float, warm: bool) -> float:
    """Times a second, over at least `seconds` and one time; `warm`: after one that does not count."""
    if warm:
        act()
    times, start = 0, time.perf_counter()
    while True:
        act()
        times += 1
        spent = time.perf_counter() - start
        if spent >= seconds:
            return times / spent


def _need_memory(case: Case) -> None:
    """Peers hold weights of their own, and most a second copy while they repack."""
    path, needed = Path("/proc/meminfo"), 4 * case.weight_bytes
    text = path.read_text() if path.is_file() else ""
    for line in text.splitlines():
        if line.startswith("MemAvailable:") and 1024 * int(line.split()[1]) < needed:
            raise Skipped(f"less than {needed / 1e9:.1f} GB of memory is free: name fewer peers, or fewer megabytes")


# ---- what is asked for


def _isas(text: str) -> list[str | None]:
    if not text:
        return [None]
    return list(library.isas()) if text == "all" else list(names("instruction set", text, library.isas()))


if __name__ == "__main__":
    sys.exit(main())
