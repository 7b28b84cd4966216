"""What the rounds say: rates, shares of the limits, ratios within a round; as a document and as CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.tables import Column, Document, Table, Text
from qcompiler.runtime import library
from tools.bench import kernels_goals as goals
from tools.bench.artifacts import git
from tools.bench.kernels_side import Case

BASE = "int4-g32"  # of ours, which the ratios of formats are against
RATE = "weights_per_second"
BUSY = 0.3  # load of each processor before a run from which on its figures are not to be quoted


def setting(
    case: Case, sides: dict[str, dict[str, Any]], reads: list[dict[str, float]], dots: list[float], dot_name: str
) -> dict[str, Any]:
    """Figures of one number of threads and rows.

    Args:
        case: what was measured.
        sides: by name: family, matrices, matrix_bytes, error, walks (a second, one figure a round).
        reads: of each round, bytes a second by read loop.
        dots: of each round, int8 operations a second in registers.
        dot_name: its instructions.
    """
    loop = best_loop(reads)
    read = [r[loop] for r in reads]
    rates = {name: [w * side["matrices"] * case.n * case.k for w in side["walks"]] for name, side in sides.items()}
    references = [name for name, side in sides.items() if side["family"] != "ours" or name == BASE]
    found = {}
    for name, side in sides.items():
        stored = [w * side["matrices"] * side["matrix_bytes"] for w in side["walks"]]
        operations = [2 * case.rows * rate for rate in rates[name]]
        found[name] = {
            "family": side["family"],
            "bits_per_weight": 8 * side["matrix_bytes"] / (case.n * case.k),
            "matrices": side["matrices"],
            "matrix_bytes": side["matrix_bytes"],
            "error": side["error"],
            "bytes_per_second": spread(stored),
            RATE: spread(rates[name]),
            "operations_per_second": spread(operations),
            "share_of_read": spread(ratios(stored, read)),
            "share_of_compute": spread(ratios(operations, dots)) if dot_name else None,
            "ratios": {other: spread(ratios(rates[name], rates[other]), keep=False) for other in references if other != name},
        }
    loops = {name: spread([r[name] for r in reads], keep=False) for name in reads[0]}
    limits = {
        "read": {"loop": loop, "bytes_per_second": spread(read), "loops": loops},
        "compute": {"instructions": dot_name, "operations_per_second": spread(dots)} if dot_name else None,
    }
    return {"threads": case.threads, "rows": case.rows, "sides": found, "limits": limits}


def best_loop(reads: list[dict[str, float]]) -> str:
    """The read loop with the highest median: the limit is the figure of one and the same loop in every round."""
    return max(reads[0], key=lambda name: float(np.median([r[name] for r in reads])))


def ratios(ours: list[float], others: list[float]) -> list[float]:
    """Figure by figure, those of a round with each other."""
    return [a / b for a, b in zip(ours, others, strict=True)]


def spread(samples: list[float], keep: bool = True) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = np.percentile(samples, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high} | ({"samples": samples} if keep else {})


def written(found: dict[str, Any] | None, digits: int, factor: float = 1) -> str | None:
    """`median [q1, q3]`."""
    if found is None:
        return None
    median, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


# ---- the faces


def document(results: dict[str, Any], command: list[str]) -> Document:
    machine = {"cpu": cpu_model(), "processors": os.cpu_count(), **environment()}
    data = {
        "command": command, "commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno")),
        "machine": machine, "library": str(library.library_path()), **results,
    }  # fmt: skip
    n, k = results["shape"]
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors (load {results['load_before']:.1f} before the run), "
        f"kernels {machine['isa']}, commit {data['commit'][:10]}{'+' if data['changed'] else ''}",
        f"matrices of {n} x {k}, {results['megabytes']:g} MB a walk{' (cache-resident)' if results['resident'] else ''}; "
        f"medians of {results['rounds']} interleaved rounds, quartiles in brackets",
        "ratios and shares: in the same round; ratios above 1: the row is faster, in weights a second",
    ]
    if results["load_before"] > BUSY * (os.cpu_count() or 1):
        lines.append("BUSY MACHINE: other programs ran before this one; threads that wait for each other lose most, so peers do")
    lines += skipped_lines(results["skipped"])
    blocks: list[Table | Text] = [Text("", lines)]
    for found in results["settings"]:
        blocks += [table(found), *peer_tables(found)]
    # They are for weights that no cache holds.
    return Document("bench-kernels", data, [*blocks, *([] if results["resident"] else goal_table(results["settings"]))])


def skipped_lines(skipped: dict[str, str]) -> list[str]:
    """One line a reason."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return [f"skipped: {', '.join(sides)}: {reason}" for reason, sides in names.items()]


def table(found: dict[str, Any]) -> Table:
    """One row a side."""
    compute = found["limits"]["compute"]
    rows = [
        (
            name, f"{side['bits_per_weight']:.3f}", written(side["bytes_per_second"], 1, 1e-9), written(side[RATE], 1, 1e-9),
            written(side["operations_per_second"], 0, 1e-9), written(side["share_of_read"], 0, 100),
            written(side["share_of_compute"], 0, 100),
            "1" if name == BASE else written(side["ratios"].get(BASE), 2), f"{side['error']:.4f}",
        )
        for name, side in found["sides"].items()
    ]  # fmt: skip
    names = ("bits", "GB/s", "G weights/s", "GOP/s", "% of read", "% of compute", f"/ {BASE}", "error")
    limit = f"read {written(found['limits']['read']['bytes_per_second'], 1, 1e-9)} GB/s ({found['limits']['read']['loop']})"
    if compute:
        limit += f", compute {written(compute['operations_per_second'], 0, 1e-9)} GOP/s ({compute['instructions']})"
    return Table(f"{heading(found)}; limits: {limit}", (Column("side"), *(Column(name, right=True) for name in names)), rows)


def heading(found: dict[str, Any]) -> str:
    """`1 thread, 4 rows`."""
    threads, rows = found["threads"], found["rows"]
    return f"{threads} thread{'s' * (threads > 1)}, {rows} row{'s' * (rows > 1)}"


def peer_tables(found: dict[str, Any]) -> list[Table]:
    """Ratios of our sides to another program's, a table for each program."""
    sides = found["sides"]
    ours = [name for name, side in sides.items() if side["family"] == "ours"]
    tables = []
    for family in dict.fromkeys(side["family"] for side in sides.values() if side["family"] != "ours"):
        others = [name for name, side in sides.items() if side["family"] == family]
        columns = (Column("ours"), *(Column(f"/ {name}", right=True) for name in others))
        rows = [(name, *(f"{sides[name]['ratios'][other]['median']:.2f}" for other in others)) for name in ours]
        if rows:
            tables.append(Table(f"{heading(found)}: weights a second, median ratios to {family}", columns, rows))
    return tables


def goal_table(settings: list[dict[str, Any]]) -> list[Table]:
    """Goals that were measured; none where a run measured none."""
    rows = []
    for goal, threads, spread in goals.found(settings):
        verdict = "yes" if spread["median"] >= goal.least else "NO"
        rows.append((goal.text, threads, goal.rows, f"{goal.least:.2f}", written(spread, 2), verdict))
    columns = (Column("goal"), *(Column(name, right=True) for name in ("threads", "rows", "at least", "found", "reached")))
    reached = sum(row[-1] == "yes" for row in rows)
    return [Table(f"goals: {reached} of {len(rows)} reached", columns, rows)] if rows else []


def write_csv(results: dict[str, Any], path: Path) -> None:
    """A line a side and setting; ratios to every reference that the run has."""
    settings = results["settings"]
    others = list(dict.fromkeys(o for found in settings for side in found["sides"].values() for o in side["ratios"]))
    figures = ("bytes_per_second", RATE, "operations_per_second", "share_of_read", "share_of_compute")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        plain = ("threads", "rows", "side", "family", "bits_per_weight", "matrices", "matrix_bytes", "error")
        spreads = [f"{figure} {q}".removesuffix(" median") for figure in figures for q in ("median", "q1", "q3")]
        writer.writerow([*plain, *spreads, *(f"ratio to {other}" for other in others)])
        for found in settings:
            for name, side in found["sides"].items():
                line = [found["threads"], found["rows"], name, *(side[key] for key in plain[3:])]
                line += [side[figure][q] if side[figure] else None for figure in figures for q in ("median", "q1", "q3")]
                writer.writerow([*line, *(side["ratios"][o]["median"] if o in side["ratios"] else None for o in others)])
