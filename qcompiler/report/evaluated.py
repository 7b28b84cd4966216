"""What `eval` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report.tables import Column, Document, Table

# Measure -> (heading, key of its standard error). What is not listed is shown under its own key.
_MEASURES = {
    "perplexity": ("perplexity", "perplexity_se"),
    "kld_mean": ("mean KLD", "kld_mean_se"),
    "kld_p99": ("99 % KLD", None),
    "same_top": ("same top token", "same_top_se"),
}


def evaluated_document(result: Mapping[str, Any]) -> Document:
    """A table of measures, each with its standard error where there is one."""
    errors = {error for _, error in _MEASURES.values() if error}
    rows = []
    for key, value in result.items():
        if key in errors or isinstance(value, (dict, list)):
            continue
        heading, error = _MEASURES.get(key, (key.replace("_", " "), None))
        rows.append((heading, value, result.get(error) if error else None))
    columns = (Column("measure"), Column("value", _number, right=True), Column("± se", _number, right=True))
    return Document("eval", result, [Table("", columns, rows)])


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
