"""The decode benchmark's figures as tables and as JSON."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from typing import Any

import numpy as np

from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.tables import Column, Document, Table, Text
from tools.bench.artifacts import git
from tools.bench.decode_goals import goals
from tools.bench.decode_limit import DESCRIPTION

RATES = ("decode", "prefill", "load")  # the higher the better
PACKAGES = ("onnxruntime", "onnxruntime-genai", "openvino", "nncf", "llama-cpp-python", "gguf")


def spread(samples: list[float], keep: bool = True) -> dict[str, Any]:
    """Median and quartiles, and the samples themselves."""
    low, median, high = np.percentile(samples, [25, 50, 75]).tolist()
    return {"median": median, "q1": low, "q3": high} | ({"samples": samples} if keep else {})


def document(cases: list[dict[str, Any]], chosen: argparse.Namespace) -> Document:
    """All of it: what was run on which machine, then every model."""
    machine = {"cpu": cpu_model(), "processors": os.cpu_count(), "load": os.getloadavg()[0], **environment()}
    versions = {package: found for package in PACKAGES if (found := _version(package)) is not None}
    data = {
        "command": sys.argv[1:], "commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno")),
        "machine": machine, "packages": versions, "threads": chosen.threads, "rounds": chosen.repeats,
        "tokens": chosen.tokens, "limit": DESCRIPTION, "cases": [case | {"goals": goals(case)} for case in cases],
    }  # fmt: skip
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors (load {machine['load']:.1f}), kernels {machine['isa']}, "
        f"{chosen.threads} threads, commit {data['commit'][:10]}{'+' if data['changed'] else ''}",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        f"medians of {chosen.repeats} interleaved rounds, quartiles in brackets; {chosen.tokens} tokens decoded a round "
        f"after {chosen.past}",
        f"limit: {DESCRIPTION}",
        "ratios: in the same round, above 1 the row is faster; small models fit into the caches",
        "memory: beyond what the process had before it opened the model; mapped pages that were read count as resident",
    ]
    blocks: list[Table | Text] = [Text("", lines)]
    for case in cases:
        blocks += [_figures(case), *(_ratios(case, rate) for rate in ("decode", "prefill") if case["peers"])]
        blocks += [_goals(case)] if goals(case) else []
        blocks.append(_notes(case))
    return Document("bench-decode", data, blocks)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _figures(case: dict[str, Any]) -> Table:
    """One row a side."""
    rows: list[tuple] = []
    for name, found in case["sides"].items():
        memory = found["memory"] or {}
        rows.append((
            name, written(found["decode"], 1), written(found["step"], 2), f"{100 * found['share_of_read']['median']:.0f}",
            written(found["prefill"], 0), written(found["load_seconds"], 2), _megabytes(memory.get("loading_anonymous")),
            _megabytes(memory.get("anonymous")), _megabytes(memory.get("resident")), f"{found['bytes_a_token'] / 1e6:.1f}",
            f"{found['file_bytes'] / 1e6:.1f}", f"{found['busy']['median']:.1f}", f"{found['cosine']:.4f}",
            f"{found['made']['seconds']:.0f}",
        ))  # fmt: skip
    names = (
        "decode, tokens/s", "step, ms", "% of read", f"prompt of {case['prompt_tokens']}, tokens/s", "load, s",
        "anonymous until loaded, MB", "anonymous, MB", "resident, MB", "MB a token", "files, MB", "processors",
        "cosine", "made in, s",
    )  # fmt: skip
    read = written(case["read_bytes_per_second"], 1, 1e-9)
    title = f"{case['model']}, {case['parameters']:,} parameters (read limit {read} GB/s)"
    return Table(title, (Column(case["model"]), *(Column(name, right=True) for name in names)), rows)


def _ratios(case: dict[str, Any], rate: str) -> Table:
    """One row for each of ours, one column for the first of them and for every peer."""
    bases = [case["ours"][0], *case["peers"]]
    rows = [
        (name, *(written(case["sides"][name]["ratios"][base][rate], 2) for base in bases)) for name in case["ours"]
    ]
    slower = [
        f"{name} / {base} {ratio:.2f}"
        for name in case["ours"]
        for base in case["peers"]
        if (ratio := case["sides"][name]["ratios"][base][rate]["median"]) < 1
    ]
    verdict = f"THE PEER IS FASTER: {', '.join(slower)}" if slower else "ours are faster than every peer"
    what = rate if rate == "decode" else f"prompt of {case['prompt_tokens']}"
    return Table(f"{case['model']}, {what}, tokens/s / the column's: {verdict}", (
        Column(case["model"]), *(Column(base, right=True) for base in bases)
    ), rows)  # fmt: skip


def _goals(case: dict[str, Any]) -> Table:
    rows = [
        (goal["what"], f"{goal['expected']:.2f}", f"{goal['found']:.2f}", "yes" if goal["met"] else "NO") for goal in goals(case)
    ]
    columns = (Column("aimed at"), Column("at least", right=True), Column("found", right=True), Column("met"))
    return Table(f"{case['model']}: {sum(goal['met'] for goal in goals(case))} of {len(rows)} goals met", columns, rows)


def _notes(case: dict[str, Any]) -> Text:
    lines = [f"{name} skipped: {reason}" for name, reason in case["skipped"].items()]
    share = f"at most {100 * case['idle_share']:.1f} % of one processor"
    lines.append(f"processor time of closed sides while another was measured: {share}")
    return Text(f"{case['model']}, notes", lines)


def written(spread: dict[str, Any], digits: int, factor: float = 1) -> str:
    """`median [lower quartile, upper quartile]`."""
    median, low, high = (f"{factor * spread[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def _megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:.0f}"
