"""The records of an artifact as plain dataclasses: layers, passes, timings (docs/artifact.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qcompiler.artifact.files import check_name
from qcompiler.artifact.manifest import NAME as MANIFEST
from qcompiler.artifact.manifest import SCHEMA, read_ours
from qcompiler.errors import GateError, InputError

RECORD_SCHEMA = 1


@dataclass(frozen=True)
class Layer:
    """One quantizable layer, or one of them left in float (then `reason` says why). Unknown keys are kept in `more`."""

    name: str
    format: str
    kind: str | None = None
    role: str | None = None
    shape: tuple[int, ...] = ()
    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    activation: str | None = None
    method: str | None = None
    clipping: str | None = None
    bits_per_weight: float | None = None
    bytes: int | None = None
    float_bytes: int | None = None
    weight_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    input_group: int | None = None
    tie_group: int | None = None
    reason: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record as it stands in layers.json."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"}
        return {**known, "shape": list(self.shape), **self.more}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, with its time and peak memory where they were measured."""

    index: int
    name: str
    stage: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    required: bool = False
    matched: int = 0
    changed: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[tuple[str, str], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    nodes_before: int | None = None
    nodes_after: int | None = None
    graph: str | None = None
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    milliseconds: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def label(self) -> str:
        """`003-normalise_linear`: unique in an artifact, also when a pass runs twice."""
        return f"{self.index:03d}-{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """The record as in passes.jsonl and timings.jsonl, joined."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("skipped", "fallbacks"):
            record[key] = [{"node": node, "reason": reason} for node, reason in getattr(self, key)]
        return record


@dataclass(frozen=True)
class Records:
    """Everything that an artifact says about how it was made. Files are read when asked for, weights never."""

    directory: Path
    manifest: Mapping[str, Any]
    layers: tuple[Layer, ...]
    left_in_float: tuple[Mapping[str, Any], ...]
    totals: Mapping[str, Any]
    passes: tuple[PassRecord, ...]

    def read(self, name: str) -> bytes | None:
        """A recorded file's bytes after checking its hash; None when the manifest does not list it."""
        return _read(self.directory, self.manifest, name)

    def text(self, name: str) -> str | None:
        """Likewise, as text."""
        data = self.read(name)
        return None if data is None else _decode(self.directory / name, data)

    def graph_text(self, record: PassRecord) -> str:
        """Canonical graph text after that pass."""
        text = self.text(record.graph) if record.graph else None
        if text is None:
            raise InputError(f"{self.directory}: no graph was kept after pass {record.label}")
        return text

    def state_after(self, index: int) -> dict[str, dict[str, Any]]:
        """What was known of each layer after pass `index`: the union of the records up to it."""
        state: dict[str, dict[str, Any]] = {}
        for record in self.passes:
            if record.index <= index:
                for name, values in record.layers.items():
                    state.setdefault(name, {}).update(values)
        return state


def load_records(directory: str | os.PathLike[str]) -> Records:
    """Read an artifact's records.

    Raises:
        InputError: no such directory, no artifact, or a record that is not what the format says.
        GateError: a record's hash is not the one in the manifest.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    manifest = read_ours(directory)
    if manifest is None:
        raise InputError(f"{directory} is not a qcompiler artifact: it has no {MANIFEST} of ours")
    if manifest.get("schema") != SCHEMA or not isinstance(manifest.get("files"), dict):
        raise InputError(
            f"{directory / MANIFEST}: schema {manifest.get('schema')!r}, expected {SCHEMA} with a list of files"
        )
    layers = _load_json(directory, manifest, "layers.json") or {"layers": [], "left_in_float": [], "totals": {}}
    timings = {record.get("index"): record for record in _load_lines(directory, manifest, "trace/timings.jsonl")}
    passes = _load_lines(directory, manifest, "trace/passes.jsonl")
    try:
        return Records(
            directory=directory,
            manifest=manifest,
            layers=tuple(_layer(record) for record in layers["layers"]),
            left_in_float=tuple(dict(record) for record in layers.get("left_in_float", [])),
            totals=dict(layers.get("totals", {})),
            passes=tuple(
                sorted((_pass(r, timings.get(r["index"], {})) for r in passes), key=lambda record: record.index)
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory}: a record is not as the format says ({type(error).__name__}: {error})"
        ) from error


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios in dB may be infinite (an exact layer); JSON has no word for that, so they are written as text."""
    return {
        key: float(value) if key.endswith("_db") and isinstance(value, str) else value for key, value in record.items()
    }


def _layer(record: Mapping[str, Any]) -> Layer:
    known = {f.name for f in fields(Layer)} - {"more"}
    values = {key: value for key, value in _numbers(record).items() if key in known}
    values["shape"] = tuple(record.get("shape") or ())
    return Layer(**values, more={key: value for key, value in record.items() if key not in known})


def _pass(record: Mapping[str, Any], timing: Mapping[str, Any]) -> PassRecord:
    known = {f.name for f in fields(PassRecord)}
    values = {key: value for key, value in record.items() if key in known}
    for key in ("skipped", "fallbacks"):
        values[key] = tuple((str(skip["node"]), str(skip["reason"])) for skip in record.get(key, ()))
    values["layers"] = {name: _numbers(change) for name, change in record.get("layers", {}).items()}
    values["milliseconds"] = timing.get("milliseconds")
    values["peak_rss_bytes"] = timing.get("peak_rss_bytes")
    return PassRecord(**values)


def _read(directory: Path, manifest: Mapping[str, Any], name: str) -> bytes | None:
    check_name(name)
    entry = manifest["files"].get(name)
    if entry is None:
        return None
    path = directory / name
    try:
        # Resolving every link on the way: a record is read from the artifact or not at all.
        if not path.resolve(strict=True).is_relative_to(directory.resolve()):
            raise InputError(f"{path} leads out of the artifact")
        data = path.read_bytes()
    except OSError as error:
        raise GateError(f"{path}: listed in {MANIFEST} but cannot be read ({error.strerror})") from error
    if not isinstance(entry, dict) or entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise GateError(
            f"{path} is not the file that was written: its SHA-256 differs from {MANIFEST}'s; see `qcompiler verify`"
        )
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: expected an object, found {type(record).__name__}")
    # timings.jsonl carries no schema of its own; passes.jsonl and layers.json do.
    if record.get("schema", RECORD_SCHEMA) != RECORD_SCHEMA:
        raise InputError(f"{path}: schema {record['schema']!r}, this version reads {RECORD_SCHEMA}")
    return record


def _load_json(directory: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    data = _read(directory, manifest, name)
    return None if data is None else _parse(directory / name, _decode(directory / name, data))


def _load_lines(directory: Path, manifest: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    data = _read(directory, manifest, name)
    if data is None:
        return []
    # Not splitlines(): JSON strings may hold characters that it takes for line ends.
    return [_parse(directory / name, line) for line in _decode(directory / name, data).split("\n") if line.strip()]
