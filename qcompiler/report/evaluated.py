"""What `eval` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report.tables import Column, Document, Table, Text

_HEADINGS = {
    "against_perplexity": "perplexity of the other",
    "ratio": "ratio of perplexities",
    "kld_mean": "mean KLD (nats)",
    "kld_p99": "99 % KLD (nats)",
    "same_top": "same top token",
    "sqnr_db": "SQNR dB",
    "max_error": "maximum error",
}

# What was measured on, as opposed to what was measured.
_SETTING = ("target", "against", "text", "context", "stride", "windows", "tokens")


def evaluated_document(result: Mapping[str, Any]) -> Document:
    """What `qcompiler.evaluate.evaluate` returned: the setting, then the measures with their standard errors."""
    setting = [f"{key:<8} {_number(result[key])}" for key in _SETTING if key in result]
    blocks: list[Table | Text] = [Text("", setting)]
    outputs = result.get("outputs")
    for title, measures in outputs.items() if isinstance(outputs, Mapping) else [("", result)]:
        blocks.append(_measures(f"output {title}" if title else "", measures))
    return Document("eval", result, blocks)


def _measures(title: str, measures: Mapping[str, Any]) -> Table:
    rows = [
        (_HEADINGS.get(key, key.replace("_", " ")), value, measures.get(f"{key}_se"))
        for key, value in measures.items()
        if not key.endswith("_se") and key not in (*_SETTING, "schema", "kind") and not isinstance(value, (dict, list))
    ]
    columns = (Column("measure"), Column("value", _number, right=True), Column("± se", _number, right=True))
    return Table(title, columns, rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
