"""`qcompiler diff`: two artifacts, or two passes of one. What did not change is hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, UsageError
from qcompiler.report import tables
from qcompiler.report.graphdiff import GraphDiff, diff_graphs, diff_lines
from qcompiler.report.inspect import find_pass
from qcompiler.report.records import Records, load_records
from qcompiler.report.tables import Column, Document, Table, Text

# What a change of a layer is said in.
KEYS = ("format", "activation", "method", "bytes", "weight_sqnr_db", "output_sqnr_db")
_HEADINGS = {"weight_sqnr_db": "weight SQNR dB", "output_sqnr_db": "output SQNR dB"}
_DISPENSABLE = {"method": 2, "activation": 1}

# Keys of the manifest that say how two artifacts differ as a whole.
_HEADER = ("qcompiler", "layout_version", "target", "kind", "model", "recipe", "context", "cache", "inputs", "outputs")


def diff_artifacts(first: Path, second: Path) -> Document:
    """What differs between two artifacts: header, recipe, layers, sizes, and the graph as it was lowered."""
    a, b = load_records(first), load_records(second)
    header = {
        key: {"before": a.manifest.get(key), "after": b.manifest.get(key)}
        for key in _HEADER
        if a.manifest.get(key) != b.manifest.get(key)
    }
    recipe = diff_lines(*((records.text("recipe.yaml") or "").splitlines() for records in (a, b)))
    layers = diff_layers({x.name: x.to_dict() for x in a.layers}, {x.name: x.to_dict() for x in b.layers})
    totals = _totals(a.totals, b.totals)
    graph = diff_graphs(_last_graph(a), _last_graph(b))
    data = {
        "a": str(first),
        "b": str(second),
        "header": header,
        "recipe": recipe,
        "layers": layers,
        "totals": totals,
        "graph": graph.to_dict(),
    }
    blocks: list[Table | Text] = []
    if header:
        headings = (Column(""), Column("A", _short), Column("B", _short))
        blocks.append(Table("artifact", headings, [(key, c["before"], c["after"]) for key, c in header.items()]))
    if recipe:
        blocks.append(Text("recipe", recipe))
    blocks += _layer_blocks(layers)
    if totals:
        columns = (
            Column("bytes of"),
            Column("A", tables.count, right=True),
            Column("B", tables.count, right=True),
            Column("change", tables.signed(tables.count), right=True),
        )
        rows = [(key.replace("_", " "), c["before"], c["after"], _difference(c)) for key, c in totals.items()]
        blocks.append(Table("size", columns, rows))
    blocks += _graph_blocks(graph)
    return Document("diff", data, blocks or [Text("", ["no difference"])])


def diff_passes(directory: Path, passes: str) -> Document:
    """What passes P to Q of one artifact did, P excluded: the difference of the state after P and after Q.

    Args:
        directory: the artifact.
        passes: `P..Q`; either may be a name, an index, a label, or empty (the capture; the last pass).
    """
    start, dots, end = passes.partition("..")
    if not dots:
        raise UsageError(f"--passes {passes!r}: expected P..Q, for instance capture..solve or 3..5")
    records = load_records(directory)
    if not records.passes:
        raise InputError(f"{directory} records no passes")
    first = find_pass(records, start) if start else records.passes[0]
    last = find_pass(records, end) if end else records.passes[-1]
    if last.index < first.index:
        raise UsageError(f"--passes {passes!r}: {last.label} ran before {first.label}")
    graph = diff_graphs(records.graph_text(first), records.graph_text(last))
    layers = diff_layers(records.state_after(first.index), records.state_after(last.index))
    between = [r for r in records.passes if first.index < r.index <= last.index]
    data = {
        "artifact": str(directory),
        "from": first.label,
        "to": last.label,
        "passes": [
            {"pass": r.label, "matched": r.matched, "changed": r.changed, "skipped": len(r.skipped)} for r in between
        ],
        "layers": layers,
        "graph": graph.to_dict(),
    }
    columns = (
        Column("pass"),
        Column("matched", tables.count, right=True),
        Column("changed", tables.count, right=True),
        Column("skipped", tables.count, right=True),
    )
    # Passes that changed nothing are part of what is hidden; the JSON has them.
    rows = [(r.label, r.matched, r.changed, len(r.skipped)) for r in between if r.changed]
    blocks = [*([Table("passes", columns, rows)] if rows else []), *_layer_blocks(layers), *_graph_blocks(graph)]
    return Document("diff", data, blocks or [Text("", ["no difference"])])


def diff_layers(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Per layer that differs: `{"status": appeared|vanished|changed, key: {"before", "after"}}` over KEYS."""
    result: dict[str, dict[str, Any]] = {}
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name, {}), after.get(name, {})
        changes: dict[str, Any] = {
            key: {"before": old.get(key), "after": new.get(key)}
            for key in KEYS
            if not _same(old.get(key), new.get(key))
        }
        if changes or (name in before) != (name in after):
            status = "changed" if name in before and name in after else "vanished" if name in before else "appeared"
            result[name] = {"status": status, **changes}
    return result


def _layer_blocks(layers: Mapping[str, Mapping[str, Any]]) -> list[Table | Text]:
    shown = [key for key in KEYS if any(key in changes for changes in layers.values())]
    if not layers:
        return []
    changes_of = [Column(_HEADINGS.get(k, k), _change, right=True, dispensable=_DISPENSABLE.get(k, 0)) for k in shown]
    columns = [Column("layer"), Column("", dispensable=3), *changes_of]
    rows = [(name, changes["status"], *(changes.get(key) for key in shown)) for name, changes in layers.items()]
    return [Table("layers", columns, rows)]


def _graph_blocks(graph: GraphDiff) -> list[Table | Text]:
    return [] if graph.empty else [Text("graph", graph.lines())]


def _totals(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    old, new = before.get("bytes", {}), after.get("bytes", {})
    return {
        key: {"before": old.get(key), "after": new.get(key)}
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    }


def _last_graph(records: Records) -> str:
    kept = [record for record in records.passes if record.graph]
    return records.graph_text(kept[-1]) if kept else ""


def _difference(change: Mapping[str, Any]) -> Any:
    if change["before"] is None or change["after"] is None:
        return None
    return change["after"] - change["before"]


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return old == new or (math.isnan(old) and math.isnan(new))
    return bool(old == new)


def _change(change: Mapping[str, Any]) -> str:
    """`21.4 → 22.0 (+0.6)`, `36,864 → 18,432 (-18,432)`, `float32 → int4-g32-sym`."""
    old, new = change["before"], change["after"]
    text = f"{_short(old)} → {_short(new)}"
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    return f"{text} ({tables.signed(_short)(new - old)})" if numbers else text


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
