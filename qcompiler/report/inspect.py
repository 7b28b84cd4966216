"""`qcompiler inspect` of an artifact: recipe, layers, what stayed in float, sizes, passes."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, UsageError
from qcompiler.report import tables
from qcompiler.report.compiled import form_lines
from qcompiler.report.records import Layer, PassRecord, Records, load_records
from qcompiler.report.tables import Column, Document, Table, Text

LAYER_COLUMNS = (
    Column("layer"),
    Column("role", dispensable=3),
    Column("shape", tables.shape, right=True, dispensable=2),
    Column("format"),
    Column("method", dispensable=4),
    Column("bits/weight", tables.decimals(2), right=True, dispensable=1),
    Column("bytes", tables.count, right=True),
    Column("weight dB", tables.decimals(1), right=True),
    Column("output dB", tables.decimals(1), right=True),
)

PASS_COLUMNS = (
    Column("pass"),
    Column("stage", dispensable=1),
    Column("matched", tables.count, right=True),
    Column("changed", tables.count, right=True),
    Column("skipped", tables.count, right=True),
    Column("fallbacks", tables.count, right=True),
    Column("ms", tables.decimals(1), right=True),
    Column("peak", tables.size, right=True),
)


def inspect_artifact(directory: Path, layer: str | None = None) -> Document:
    """What an artifact is made of and how it was made.

    Args:
        directory: the artifact.
        layer: glob on layer names; only those are shown, each with what every pass changed about it.

    Raises:
        InputError: no artifact, or no layer fits the glob.
        GateError: a record does not fit its hash.
    """
    records = load_records(directory)
    layers = select_layers(records, layer)
    names = {entry.name for entry in layers}
    history = _history(records, names) if layer else None
    data = {
        "artifact": {key: value for key, value in records.manifest.items() if key not in ("files", "schema", "format")},
        "recipe": records.text("recipe.yaml"),
        "layers": [entry.to_dict() for entry in layers],
        "left_in_float": [dict(record) for record in records.left_in_float],
        "totals": dict(records.totals),
        "passes": [record.to_dict() for record in records.passes],
    }
    if history is not None:
        data["history"] = history
    blocks: list[Table | Text] = [_header(records)]
    if layer is None and (recipe := records.text("recipe.yaml")):
        blocks.append(Text("recipe as resolved", recipe.rstrip("\n").split("\n")))
    blocks.append(
        Table("layers (SQNR of weight and output in dB)", LAYER_COLUMNS, [layer_row(entry) for entry in layers])
    )
    blocks += _float_blocks(records, layers)
    if history is not None:
        blocks.append(Text("what each pass changed", _history_lines(history)))
    else:
        blocks += [_totals(records), *_pass_blocks(records)]
    return Document("inspect", data, [block for block in blocks if not isinstance(block, Table) or block.rows])


def graph_after(directory: Path, name: str) -> str:
    """Canonical graph text after the pass of that name, index (`3`) or label (`003-normalise_linear`)."""
    records = load_records(directory)
    return records.graph_text(find_pass(records, name))


def find_pass(records: Records, name: str) -> PassRecord:
    """The pass of that name, index or label; UsageError that lists them when there is none or more than one."""
    found = [r for r in records.passes if name in (r.name, r.label) or (name.isdecimal() and int(name) == r.index)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(r.label for r in found or records.passes) or "none is recorded"
    if found:
        raise UsageError(f"pass {name!r} ran {len(found)} times; say which: {listed}")
    raise UsageError(f"{records.directory} has no pass {name!r}; passes: {listed}")


def select_layers(records: Records, glob: str | None) -> list[Layer]:
    """Layers whose name fits the glob (all without one)."""
    if glob is None:
        return list(records.layers)
    found = [entry for entry in records.layers if fnmatch.fnmatchcase(entry.name, glob)]
    if not found:
        examples = ", ".join(entry.name for entry in records.layers[:3])
        raise InputError(
            f"{records.directory} has no layer like {glob!r}; layers are named like {examples or '(none)'}"
        )
    return found


def layer_row(entry: Layer) -> Sequence[Any]:
    """A layer's cells under LAYER_COLUMNS."""
    return (
        entry.name,
        entry.role,
        entry.shape,
        entry.format,
        entry.method,
        entry.bits_per_weight,
        entry.bytes,
        entry.weight_sqnr_db,
        entry.output_sqnr_db,
    )


def _header(records: Records) -> Text:
    manifest = records.manifest
    model = manifest.get("model") or {}
    parameters = model.get("parameters")
    lines = [
        f"model       {model.get('source', '?')} ({model.get('type') or 'unknown type'})"
        + (f", {parameters:,} parameters" if isinstance(parameters, int) else ""),
        f"kind        {manifest.get('kind')}, target {manifest.get('target')}, entry {manifest.get('entry')}",
        f"recipe      {manifest.get('recipe')}",
        f"context     {manifest.get('context') or 'unknown'}",
        f"written by  qcompiler {manifest.get('qcompiler')}, layout {manifest.get('layout_version')}",
    ]
    totals = records.totals
    if "bits_per_weight" in totals and "coverage" in totals:
        lines.append(f"weights     {totals['bits_per_weight']:.2f} bits each, {totals['coverage']:.1%} quantized")
    lines += form_lines(manifest)
    for key in ("unfused", "fallbacks", "allowed"):
        if manifest.get(key):
            lines.append(f"{key:<11} {_brief(manifest[key])}")
    return Text(str(records.directory), lines)


def _float_blocks(records: Records, layers: Sequence[Layer]) -> list[Table | Text]:
    rows: list[Sequence[Any]] = [
        (entry.name, entry.float_bytes or entry.bytes, entry.reason) for entry in layers if entry.reason
    ]
    known = {name for name, _, _ in rows}
    if len(layers) == len(records.layers):
        rows += [
            (record.get("name"), record.get("bytes"), record.get("reason"))
            for record in records.left_in_float
            if record.get("name") not in known
        ]
    return [Table("left in float", (Column("what"), Column("bytes", tables.count, right=True), Column("why")), rows)]


def _totals(records: Records) -> Table:
    parts = dict(records.totals.get("bytes", {}))
    total = parts.pop("total", None)
    rows = [(name.replace("_", " "), amount, amount / total if total else None) for name, amount in parts.items()]
    if total is not None:
        rows.append(("total", total, 1.0))
    columns = (
        Column("bytes of"),
        Column("bytes", tables.count, right=True),
        Column("share", "{:.1%}".format, right=True),
    )
    return Table("size", columns, rows)


def _pass_blocks(records: Records) -> list[Table | Text]:
    rows = [
        (r.label, r.stage, r.matched, r.changed, len(r.skipped), len(r.fallbacks), r.milliseconds, r.peak_rss_bytes)
        for r in records.passes
    ]
    lines = []
    for record in records.passes:
        lines += _reasons(record.label, "skipped", record.skipped)
        lines += _reasons(record.label, "fell back", record.fallbacks)
    blocks: list[Table | Text] = [Table("passes", PASS_COLUMNS, rows)]
    if lines:
        blocks.append(Text("skipped and why", lines))
    return blocks


def _reasons(label: str, what: str, skips: Sequence[tuple[str, str]]) -> list[str]:
    """One line a reason: how often and where first. `--json` has every place."""
    places: dict[str, list[str]] = {}
    for node, reason in skips:
        places.setdefault(reason, []).append(node)
    return [
        f"{label}: {what} {len(nodes)}× {reason} ({nodes[0]}{', …' if len(nodes) > 1 else ''})"
        for reason, nodes in places.items()
    ]


def _history(records: Records, names: set[str]) -> dict[str, list[dict[str, Any]]]:
    history: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(names)}
    for record in records.passes:
        for name in names & record.layers.keys():
            history[name].append({"pass": record.label, **record.layers[name]})
    return history


def _history_lines(history: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for name, steps in history.items():
        lines.append(name)
        for step in steps:
            values = ", ".join(f"{key} {_brief(value)}" for key, value in step.items() if key != "pass")
            lines.append(f"  {step['pass']}: {values}")
        if not steps:
            lines.append("  no pass recorded a change")
    return lines


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return (
            "none"
            if not value
            else f"{len(value)}: {'; '.join(_brief(item) for item in value[:3])}{'; …' if len(value) > 3 else ''}"
        )
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
