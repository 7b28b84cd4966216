"""The record of a compile: one entry a pass, with the graph's text after it and what it did to every layer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler.pipeline.passes import Pass, Report

if TYPE_CHECKING:
    from qcompiler.artifact.writer import ArtifactWriter

SCHEMA = 1


def plain(value: Any) -> Any:
    """JSON-able: dataclasses as mappings, infinities as strings (JSON has none), floats to 6 significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


@dataclass
class Entry:
    """One pass: its record (deterministic), its timing (not), and the graph's canonical text after it."""

    record: dict[str, Any]
    timing: dict[str, Any]
    text: str


@dataclass
class Trace:
    """Everything that was recorded, in order; entry 0 is the graph as captured.

    Attributes:
        timings: write times and memory too: the one part of a trace that differs between two equal runs.
    """

    entries: list[Entry] = field(default_factory=list)
    timings: bool = True

    def add(
        self, step: Pass | None, report: Report, text: str, nodes: tuple[int, int], timing: dict[str, float]
    ) -> None:
        index = len(self.entries)
        name = step.name if step is not None else "capture"
        record = {
            "schema": SCHEMA,
            "index": index,
            "name": name,
            "stage": step.stage if step is not None else "capture",
            "config": plain(step) if step is not None else {},
            "required": step.required if step is not None else False,
            **{
                key: plain(getattr(report, key))
                for key in ("matched", "changed", "skipped", "fallbacks", "notes", "layers")
            },
            "nodes_before": nodes[0],
            "nodes_after": nodes[1],
            "graph": f"trace/graphs/{index:03d}-{name}.txt",
        }
        self.entries.append(Entry(record, {"index": index, "name": name, **plain(timing)}, text))

    def add_numbers(
        self, name: str, stage: str, layers: dict[str, dict[str, Any]], notes: dict[str, Any], timing: dict[str, float]
    ) -> None:
        """A measurement between passes: the graph stays as it is, layers gain numbers."""
        last = self.entries[-1]
        nodes = (last.record["nodes_after"],) * 2
        self.add(None, Report(len(layers), 0, layers=layers, notes=notes), last.text, nodes, timing)
        entry = self.entries[-1]
        entry.record |= {"name": name, "stage": stage, "graph": last.record["graph"]}
        entry.timing["name"] = name

    def layers(self) -> dict[str, dict[str, Any]]:
        """The state of every layer after the last pass."""
        state: dict[str, dict[str, Any]] = {}
        for entry in self.entries:
            for name, change in entry.record["layers"].items():
                state.setdefault(name, {}).update(change)
        return state

    def write(self, writer: ArtifactWriter) -> None:
        """Write `trace/` into an artifact."""
        written = set()
        for entry in self.entries:
            if entry.record["graph"] not in written:
                writer.write_text(entry.record["graph"], entry.text)
                written.add(entry.record["graph"])
        writer.write_lines("trace/passes.jsonl", [entry.record for entry in self.entries])
        timings = [entry.timing for entry in self.entries]
        if not self.timings:
            timings = [{key: timing[key] for key in ("index", "name")} for timing in timings]
        writer.write_lines("trace/timings.jsonl", timings)
