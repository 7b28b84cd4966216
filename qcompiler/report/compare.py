"""What `compare` prints: one row a recipe, with the set to choose from marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report import tables
from qcompiler.report.progress import duration
from qcompiler.report.tables import Column, Document, Table, Text

MARK = "*"

_AXES = {"kld_mean": "closer to the float model (mean KLD)", "sqnr_db": "closer to the float model (SQNR)"}


def compare_document(result: Mapping[str, Any]) -> Document:
    """What `qcompiler.compare.compare` returned."""
    outputs = result["kind"] == "outputs"
    columns = (
        Column("recipe"),
        Column(MARK),
        Column("size", tables.size, right=True),
        Column("bits/weight", tables.decimals(2), right=True, dispensable=3),
        *(_OUTPUT_COLUMNS if outputs else _SCORE_COLUMNS),
        *(() if outputs else _SPEED_COLUMNS),
        Column("compile", duration, right=True, dispensable=5),
        Column("peak memory", tables.size, right=True, dispensable=6),
    )
    rows = [_float(result["float"], outputs), *(_cells(row, outputs) for row in result["rows"])]
    lines = [f"model        {result['model']}, target {result['target']}", f"text         {result['text']}"]
    if result["windows"] is not None:
        lines.append(f"measured on  {result['tokens']:,} tokens in {result['windows']} windows of {result['context']}")
    if not outputs:
        lines.append(f"speed        {_speed(result['speed'])}")
    blocks: list[Table | Text] = [Text("", lines), Table("", columns, rows)]
    if result["pareto"]["recipes"]:
        blocks.append(Text("", [f"{MARK} no other recipe here is both smaller and {_AXES[result['pareto']['axes'][1]]}"]))
    failed = [f"{row['recipe']}: {row['error']['message']}" for row in result["rows"] if row["error"] is not None]
    if failed:
        blocks.append(Text("failed", failed))
    return Document("compare", result, blocks)


_SCORE_COLUMNS = (
    Column("perplexity", tables.decimals(2), right=True),
    Column("± se", tables.decimals(2), right=True, dispensable=8),
    Column("KLD", tables.decimals(5), right=True),
    Column("± se", tables.decimals(5), right=True, dispensable=7),
    Column("KLD 99 %", tables.decimals(4), right=True, dispensable=4),
    Column("same top", "{:.1%}".format, right=True),
)
_SPEED_COLUMNS = (
    Column("decode/s", tables.decimals(0), right=True, dispensable=1),
    Column("prompt/s", tables.decimals(0), right=True, dispensable=2),
)
_OUTPUT_COLUMNS = (Column("cosine", tables.decimals(5), right=True), Column("SQNR dB", tables.decimals(1), right=True))
_SCORES = ("perplexity", "perplexity_se", "kld_mean", "kld_mean_se", "kld_p99", "same_top")


def _float(measured: Mapping[str, Any], outputs: bool) -> tuple[Any, ...]:
    scores = (None, None) if outputs else (measured["perplexity"], measured["perplexity_se"], 0.0, None, None, 1.0, None, None)
    return "float (torch)", "", measured["bytes"], 32.0, *scores, None, None


def _cells(row: Mapping[str, Any], outputs: bool) -> tuple[Any, ...]:
    scores = (row["cosine"], row["sqnr_db"]) if outputs else tuple(row[name] for name in _SCORES)
    speeds = () if outputs else (_median(row["decode_tokens_per_second"]), _median(row["prefill_tokens_per_second"]))
    mark = MARK if row["pareto"] else "" if row["error"] is None else "failed"
    took = (row["compile_seconds"], row["peak_rss_bytes"])
    return row["recipe"], mark, row["bytes"], row["bits_per_weight"], *scores, *speeds, *took


def _median(spread: Mapping[str, Any] | None) -> float | None:
    return None if spread is None else spread["median"]


def _speed(setting: Mapping[str, Any]) -> str:
    threads = f"{setting['threads']} threads" if setting["threads"] else "all threads"
    return (
        f"prompt of {setting['prompt_tokens']}, {setting['new_tokens']} new tokens, median of {setting['repeats']} rounds; "
        f"{setting['cpu']}, {threads}"
    )
