"""What `sensitivity` prints: the layers, the most sensitive first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report import tables
from qcompiler.report.progress import duration
from qcompiler.report.tables import Column, Document, Table, Text


def sensitivity_document(result: Mapping[str, Any], by: int | None = None, saved: str | None = None) -> Document:
    """What `qcompiler.sensitivity.sensitivity` returned.

    Args:
        by: the width that the rows are ordered by; 4 bits where they were measured, else the fewest.
        saved: where the recipe went, or None.
    """
    widths = result["bits"]
    by = by or (4 if 4 in widths else min(widths))
    layers = {layer["name"]: layer for layer in result["layers"]}
    rows = []
    for rank, name in enumerate(result["ranking"][str(by)], 1):
        layer = layers[name]
        measures = [layer["kld"][str(bits)][key] for bits in widths for key in ("mean", "se")]
        rows.append((rank, name, layer["role"], layer["shape"], layer["weights"], *measures))
    columns = (
        Column("rank", str, right=True),
        Column("layer"),
        Column("role", dispensable=2),
        Column("shape", tables.shape, right=True, dispensable=3),
        Column("weights", tables.count, right=True, dispensable=1),
        *(c for b in widths for c in (Column(f"KLD {b} bits", _nats, True), Column("± se", _nats, True, dispensable=4))),
    )
    lines = [
        f"{result['model']}: {len(layers)} layers, {result['samples']} windows of {result['length']} tokens, "
        f"{duration(result['seconds'])}",
        f"text  {result['text']}",
        f"KL(float ‖ only that layer rounded, {_groups(result['group'])}) in nats a token; ordered by {by} bits",
    ]
    blocks: list[Table | Text] = [Text("", lines), Table("", columns, rows)]
    if saved is not None:
        blocks.append(Text("", [f"recipe {result['recipe']['name']}: {saved}"]))
    return Document("sensitivity", {**result, "ordered_by": by, "saved_recipe": saved}, blocks)


def _groups(group: int) -> str:
    return f"groups of {group}" if group else "one scale a row"


def _nats(value: float) -> str:
    return f"{value:.2e}"
