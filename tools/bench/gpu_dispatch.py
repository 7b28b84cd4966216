"""A dispatch table from what a run measured: which kernels and configurations are tried, and which of them won where."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import isqrt
from typing import Any

from qcompiler.ops.formats import VqFormat
from tools.bench.gpu_ours import Choice, Ours

SCHEMA = 1
CHUNK = 33554432  # bytes of a scratch that stays in the second cache
FEW, ALL = "few", "all"


def candidates(side: Ours, rows: int, search: str) -> list[Choice]:
    """What is worth a try for a side and a number of rows: `few` for a quick look, `all` before a table is shipped."""
    found: list[Choice] = []
    vq = isinstance(side.format, VqFormat)
    every = search == ALL
    if rows <= 4:
        for block_n in (32, 64, 128) if every else (64,):
            for block_k in (64, 128, 256) if every else (128,):
                for warps in (1, 2, 4) if every else (4,):
                    found.append(_gemv("gemv", block_n, block_k, warps))
    for block_m in _tiles(rows, every):
        for block_n in (32, 64, 128) if every else (64, 128):
            for warps, stages in ((2, 1), (4, 1), (4, 2), (4, 3), (8, 2)) if every else ((4, 1), (4, 3)):
                found.append(_dot("dot", block_m, block_n, warps, stages))
    if vq:
        found += [_gemv("gemv_gather", 64, 128, 4)] if rows <= 4 else []
        found += [_dot("dot_gather", _tiles(rows, False)[0], 64, 4, 1)]
        if side.activations == "float":
            found += [_dot("dot_narrow", _tiles(rows, False)[0], block_n, 4, 1) for block_n in (64, 128)]
    if rows >= 16:
        found += [Choice("matmul", {"chunk": chunk}) for chunk in (0, CHUNK)]
    if side.activations != "float" and not vq and not side.format.group and rows > 16:
        found.append(Choice("int_mm", {"chunk": 0}))
    return found


def _tiles(rows: int, every: bool) -> tuple[int, ...]:
    if rows <= 16:
        return (16,)
    return (32, 64, 128) if every else (64,)


def _gemv(kernel: str, block_n: int, block_k: int, warps: int) -> Choice:
    return Choice(kernel, {"block_n": block_n, "block_k": block_k, "split": 0, "warps": warps, "stages": 2})


def _dot(kernel: str, block_m: int, block_n: int, warps: int, stages: int) -> Choice:
    split = 0 if block_m == 16 else 1
    return Choice(
        kernel, {"block_m": block_m, "block_n": block_n, "block_k": 128, "split": split, "warps": warps, "stages": stages}
    )


# ---- the table


def proposed(results: dict[str, Any]) -> dict[str, Any]:
    """A document of the dispatch table's form: the fastest of ours for every format, activations, shape and rows measured.

    A number of rows between two that were measured is as the larger, one above all as the largest. A shape that was measured
    has rules of its own where they differ from those of its number of outputs; other shapes are as the one whose outputs are
    nearest. float16 and bfloat16 have the same rules, the faster one's where both were measured.
    """
    rules: list[dict[str, Any]] = []
    key = lambda record: (record["op"], record["format"], record["activation"])  # noqa: E731
    for (op, format, activation), records in _grouped(_ours(results), key):
        by_shape = {shape: _by_rows(group) for shape, group in _grouped(records, lambda r: (r["n"], r["k"]))}
        first: dict[int, tuple[int, int]] = {}
        for shape in sorted(by_shape):
            first.setdefault(shape[0], shape)
        base = {"op": op, "format": format, "activation": activation, "dtype": ["float16", "bfloat16"]}
        for shape, choices in sorted(by_shape.items()):
            if choices != by_shape[first[shape[0]]]:
                exact = {"outputs": [shape[0], shape[0]], "inputs": [shape[1], shape[1]]}
                rules += [{**base, **exact, **rule} for rule in _rows_rules(choices)]
        outputs = sorted(first)
        for place, n in enumerate(outputs):
            low = 0 if place == 0 else isqrt(outputs[place - 1] * n) + 1
            high = None if place + 1 == len(outputs) else isqrt(n * outputs[place + 1])
            sized = {} if len(outputs) == 1 else {"outputs": [low, high]}
            rules += [{**base, **sized, **rule} for rule in _rows_rules(by_shape[first[n]])]
    return {"schema": SCHEMA, "devices": {results["machine"]["device"]: rules}}


def _ours(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for setting in results["settings"]:
        for side in setting["sides"].values():
            if side["family"] == "ours":
                yield {**side, "n": setting["n"], "k": setting["k"], "rows": setting["rows"]}


def _grouped(records: Any, key: Any) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    for value, group in groupby(sorted(records, key=key), key):
        yield value, list(group)


def _by_rows(records: list[dict[str, Any]]) -> list[tuple[int, str, dict[str, int]]]:
    """Rows, kernel and configuration, the fastest where several types of activations were measured."""
    best: dict[int, dict[str, Any]] = {}
    for record in records:
        known = best.get(record["rows"])
        if known is None or record["seconds"]["median"] < known["seconds"]["median"]:
            best[record["rows"]] = record
    return [(rows, best[rows]["kernel"], best[rows]["config"]) for rows in sorted(best)]


def _rows_rules(choices: list[tuple[int, str, dict[str, int]]]) -> list[dict[str, Any]]:
    """A rule for each stretch of rows with the same choice."""
    rules: list[dict[str, Any]] = []
    low = 0
    for place, (rows, kernel, config) in enumerate(choices):
        last = place + 1 == len(choices)
        if not last and choices[place + 1][1:] == (kernel, config):
            continue
        rules.append({"rows": [low, None if last else rows], "kernel": kernel, "config": config})
        low = rows + 1
    return rules
