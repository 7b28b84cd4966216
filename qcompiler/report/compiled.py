"""What `compile` says when it is done, and what `compile --dry-run` says instead of doing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.report import tables
from qcompiler.report.progress import duration
from qcompiler.report.records import load_records
from qcompiler.report.tables import Column, Document, Table, Text

PLAN_COLUMNS = (
    Column("layer"),
    Column("role", dispensable=2),
    Column("shape", tables.shape, right=True, dispensable=1),
    Column("format"),
    Column("bits/weight", tables.decimals(2), right=True),
    Column("bytes", tables.count, right=True),
    Column("note"),
)


def compiled_document(directory: Path, seconds: float) -> Document:
    """Summary of an artifact just made, read back from it."""
    records = load_records(directory)
    total = sum(info.get("bytes", 0) for info in records.manifest["files"].values())
    before = sum(layer.float_bytes or 0 for layer in records.layers)
    formats: dict[str, int] = {}
    for layer in records.layers:
        formats[layer.format] = formats.get(layer.format, 0) + 1
    left = [layer.name for layer in records.layers if layer.reason] + [
        record.get("name") for record in records.left_in_float if record.get("name")
    ]
    data = {
        "output": str(directory),
        "target": records.manifest.get("target"),
        "kind": records.manifest.get("kind"),
        "recipe": records.manifest.get("recipe"),
        "bytes": total,
        "formats": formats,
        "totals": dict(records.totals),
        "left_in_float": list(dict.fromkeys(left)),
        "unfused": list(records.manifest.get("unfused", [])),
        "fallbacks": list(records.manifest.get("fallbacks", [])),
        "seconds": round(seconds, 3),
    }
    lines = [
        f"{directory}: {tables.size(total)} in {len(records.manifest['files'])} files, {duration(seconds)}",
        "layers      " + ", ".join(f"{count}× {name}" for name, count in sorted(formats.items())),
    ]
    bits, coverage = records.totals.get("bits_per_weight"), records.totals.get("coverage")
    if bits is not None and coverage is not None:
        was = f" (float: {tables.size(before)})" if before else ""
        lines.append(f"weights     {bits:.2f} bits each, {coverage:.1%} quantized{was}")
    lines += form_lines(records.manifest)
    for key in ("left_in_float", "unfused", "fallbacks"):
        if data[key]:
            lines.append(f"{key.replace('_', ' '):<11} {len(data[key])} (see `qcompiler inspect {directory}`)")
    return Document("compile", data, [Text("", lines)])


def form_lines(manifest: Mapping[str, Any]) -> list[str]:
    """What a user of the artifact has to know of its form, where that is not what its kind says."""
    lines = []
    if whole := manifest.get("whole_text"):
        lines.append(f"cache       none: {whole.get('reason')}; every token costs the whole text before it once more")
        if whole.get("causal") is False:
            lines.append("logits      later tokens change those of earlier ones: only the last predict")
    if manifest.get("kind") == "encoder-decoder":
        lines.append("cache       none: encoder and decoder are one graph; every token costs both texts once more")
    if left := manifest.get("left_out"):
        named = ", ".join(f"{name} ({tables.size(size)})" for name, size in left.items())
        lines.append(f"left out    the text path alone was compiled, without {named}")
    if fixed := manifest.get("fixed_length"):
        filled = "which changes nothing of them" if fixed.get("exact") else "which the model computes otherwise than them alone"
        lines.append(f"length      {fixed.get('tokens')} tokens, one length; shorter texts are filled up, {filled}")
    elif "longest" in manifest:
        lines.append(f"longest     texts of {manifest['longest']} tokens: the model computes longer ones in another way")
    return lines


def plan_document(plan: Mapping[str, Any]) -> Document:
    """The dry run: what `qcompiler.compiler.plan` returned."""
    data = {key: value for key, value in plan.items() if key != "schema"}
    rows = [
        (
            row.get("name"),
            row.get("role"),
            row.get("shape") or (),
            row.get("format"),
            row.get("bits_per_weight"),
            row.get("bytes"),
            row.get("reason"),
        )
        for row in data.get("layers", [])
    ]
    totals = data.get("totals") or {}
    sizes = dict(totals.get("bytes") or {})
    whole = sizes.pop("total", None)
    # Weights alone: float tensors, alignment and the graph are no part of a quantized layer.
    packed = sum(sizes.get(key, 0) for key in ("codes", "scales", "zeros", "codebooks", "padding", "outliers", "activations"))
    was = totals.get("float_bytes")
    lines = [f"weights      {packed:,} bytes{f' (float: {was:,})' if was is not None else ''}"]
    for key, label, write in (
        ("bits_per_weight", "bits/weight", "{:.2f}".format),
        ("coverage", "coverage", "{:.1%}".format),
    ):
        if totals.get(key) is not None:
            lines.append(f"{label:<12} {write(totals[key])}")
    if whole is not None:
        lines.append(f"model files  {tables.size(whole)} (estimate: {_parts(sizes)})")
    peak = totals.get("peak_bytes")
    if peak is not None:
        memory = totals.get("memory")
        lines.append(f"peak memory  {tables.size(peak)} (estimate{': ' + _parts(memory) if memory else ''})")
    lines.append("nothing was done (--dry-run)")
    return Document("plan", data, [Table("would be made", PLAN_COLUMNS, rows), Text("", lines)])


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {tables.size(value)}" for name, value in sizes.items() if value)
