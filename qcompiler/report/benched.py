"""What `bench` prints: the numbers, and the machine that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.errors import QCompilerError
from qcompiler.report import tables
from qcompiler.report.doctor import cpu_model
from qcompiler.report.tables import Column, Document, Table, Text


def benched_document(artifact: str, result: Mapping[str, Any], portable: bool) -> Document:
    """What `qcompiler.runtime.bench.bench` returned, with the machine in it."""
    kernels = _kernels(result.get("target"), portable, result.get("device", "cpu"))
    data = {"artifact": artifact, "cpu": cpu_model(), "kernels": kernels, **result}
    prefill, decode = result["prefill_tokens_per_second"], result["decode_tokens_per_second"]
    step = result["milliseconds_per_token"]
    rows = [
        (f"prompt, {result['prompt_tokens']} tokens", "tokens/s", prefill["median"], prefill["min"], prefill["max"]),
        (f"decode, {result['new_tokens']} tokens", "tokens/s", decode["median"], decode["min"], decode["max"]),
        ("one token (p10, p90)", "ms", step["median"], step["p10"], step["p90"]),
    ]
    number = tables.decimals(2)
    columns = (
        Column(f"median of {result['repeats']}"),
        Column("unit"),
        Column("median", number, right=True),
        Column("low", number, right=True),
        Column("high", number, right=True),
    )
    peak = result.get("peak_rss_bytes")
    lines = [
        f"{artifact}: {tables.size(result['file_bytes'])}, loaded in {result['load_seconds']:.2f} s",
        f"{data['cpu']}, kernels {kernels}, threads {result['threads'] or 'all'}, onnxruntime {result['onnxruntime']}",
        *([f"peak memory of the process {tables.size(peak)}"] if peak is not None else []),
    ]
    return Document("bench", data, [Text("", lines), Table("", columns, rows)])


def _kernels(target: Any, portable: bool, device: str) -> str:
    """Which kernels ran: ours by instruction set or on a GPU, or ONNX Runtime's own."""
    if device != "cpu":
        return f"triton on {device}"
    if target == "onnx-stock":
        return "onnxruntime"
    if portable and target == "onnx":
        return "none (function bodies in onnxruntime)"
    try:
        from qcompiler.runtime import library

        return library.isa()
    except QCompilerError:
        return "unknown"
