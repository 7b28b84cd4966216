"""What a run on a GPU says: rates, shares of the copy, ratios to float16 and to other programs; as a document."""

from __future__ import annotations

from typing import Any

from qcompiler.report.tables import Column, Document, Table, Text
from tools.bench import gpu_goals as goals
from tools.bench.kernels_report import skipped_lines

BASES = ("float16", "bfloat16")


def setting(n: int, k: int, rows: int, sides: dict[str, dict[str, Any]], copy: dict[str, Any]) -> dict[str, Any]:
    """Figures of one shape and number of rows.

    Args:
        sides: by name: `family`, `matrix_bytes`, `matrices`, `error`, `seconds` (median, p20, p80, samples), and for ours `op`,
            `format`, `activation`, `kernel`, `config`, `tried`.
        copy: bytes a second of a device copy (median, …).
    """
    references = [name for name, side in sides.items() if side["family"] != "ours"]
    found = {}
    for name, side in sides.items():
        rate = side["matrix_bytes"] / side["seconds"]["median"]
        found[name] = {
            **side,
            "bits_per_weight": 8 * side["matrix_bytes"] / (n * k),
            "bytes_per_second": rate,
            "share_of_copy": rate / copy["median"],
            "ratios": {o: sides[o]["seconds"]["median"] / side["seconds"]["median"] for o in references if o != name},
        }
    return {"n": n, "k": k, "rows": rows, "sides": found}


def document(results: dict[str, Any], command: list[str]) -> Document:
    """The report of a run; `results` as `gpu.run` gives them."""
    machine, copy = results["machine"], results["copy"]
    clocks = ", ".join(f"{name} {value}" for name, value in machine["clocks"].items())
    lines = [
        f"{machine['device']} (compute capability {machine['capability']}), driver {machine['driver']}, {clocks}, "
        f"ECC {machine['ecc']}",
        f"torch {machine['torch']} (CUDA {machine['cuda']}), triton {machine['triton']}, commit "
        f"{machine['commit'][:10] or 'unknown'}"
        f"{'+' if machine['changed'] else ''}",
        f"device copy: {_spread(copy, 1e-9, 0)} GB/s, bytes read and written: the limit that shares are of",
        f"CUDA graphs over different matrices, {results['cold_bytes'] / 2**20:.0f} MiB at least, so that no weight is in the "
        f"second cache; activations are. Median and [p20, p80] of {results['replays']} replays",
        "GB/s: of the weight as stored, its scales and codebooks included; ratios above 1: the row is faster than the column",
        *skipped_lines(results["skipped"]),
    ]
    if left := results["unmeasured"]:
        lines.append(f"NOT MEASURED, the run ended before: {len(left)}, from {left[0]} on")
    blocks: list[Table | Text] = [Text("", lines), *(table(found) for found in results["settings"])]
    data = {"command": command, **results}
    return Document("bench-gpu", data, [*blocks, *losses(results["settings"]), *goal_table(results["settings"])])


def _spread(found: dict[str, Any], factor: float, digits: int) -> str:
    median, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} [{low}, {high}]"


def table(found: dict[str, Any]) -> Table:
    """One row a side."""
    sides = found["sides"]
    others = [name for name, side in sides.items() if side["family"] != "ours"]
    names = ("bits", "µs", "GB/s", "% of copy", *(f"/ {other}" for other in others), "error")
    rows = []
    for name, side in sides.items():
        ratios = ["1" if other == name else f"{side['ratios'][other]:.2f}" for other in others]
        figures = [f"{side['bits_per_weight']:.3f}", _spread(side["seconds"], 1e6, 1), f"{1e-9 * side['bytes_per_second']:.0f}"]
        share = f"{100 * side['share_of_copy']:.0f}"
        rows.append((name, *figures, share, *ratios, f"{side['error']:.4f}", side.get("kernel")))
    columns = (Column("side"), *(Column(name, right=True) for name in names), Column("kernel"))
    return Table(heading(found), columns, rows)


def heading(found: dict[str, Any]) -> str:
    """`4096 x 14336, 16 rows`."""
    return f"{found['n']} x {found['k']}, {found['rows']} row{'s' * (found['rows'] > 1)}"


def losses(settings: list[dict[str, Any]]) -> list[Text]:
    """Where a peer or plain float16 is faster than ours in the same number of bits or fewer."""
    lines = []
    for found in settings:
        for name, side in found["sides"].items():
            behind = [f"{o} ({1 / r:.2f}x)" for o, r in side["ratios"].items() if r < 1 and _comparable(found, name, o)]
            if side["family"] == "ours" and behind:
                lines.append(f"{heading(found)}: {name} is behind {', '.join(behind)}")
    return [Text("where others are faster", lines)] if lines else []


def _comparable(found: dict[str, Any], name: str, other: str) -> bool:
    """A float weight for all; another program's format for those that are as accurate: of as many bits, within half a bit."""
    sides = found["sides"]
    return other in BASES or abs(sides[other]["bits_per_weight"] - sides[name]["bits_per_weight"]) <= 0.5


def goal_table(settings: list[dict[str, Any]]) -> list[Table]:
    """Goals that were measured; none where a run measured none."""
    rows = []
    for goal, found, ratio in goals.found(settings):
        verdict = "good" if ratio >= goal.good else "yes" if ratio >= goal.must else "NO"
        what = (f"{goal.side} / {goal.against}", f"{found['n']}x{found['k']}", goal.rows)
        rows.append((*what, f"{goal.must:.2f}", f"{goal.good:.2f}", f"{ratio:.2f}", verdict))
    columns = (Column("goal"), *(Column(name, right=True) for name in ("shape", "rows", "must", "good", "found", "reached")))
    reached = sum(row[-1] != "NO" for row in rows)
    return [Table(f"goals: {reached} of {len(rows)} reached", columns, rows)] if rows else []
