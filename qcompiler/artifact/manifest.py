"""The manifest: what an artifact is, and the hash of every file in it (docs/artifact.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.errors import GateError
from qcompiler.ops.formats import LAYOUT_VERSION

FORMAT = "qcompiler-artifact"
SCHEMA = 1
NAME = "manifest.json"
SEAL = "manifest_sha256"

TARGETS = ("onnx", "onnx-stock", "torch")
KINDS = ("decoder", "encoder", "encoder-decoder", "module")

# A manifest is kilobytes; anything of this size is something else under that name.
_MAX_BYTES = 100 * 2**20


def version() -> str:
    """The version of qcompiler that runs."""
    import qcompiler

    found = getattr(qcompiler, "__version__", None)
    if found is None:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            found = installed("qcompiler")
        except PackageNotFoundError:
            found = "unknown"
    return str(found)


def build_manifest(
    *,
    target: str,
    kind: str,
    source: str,
    model_type: str | None,
    parameters: int,
    recipe: str,
    entry: str,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    cache: Mapping[str, Any] | None = None,
    tokens: Mapping[str, Any] | None = None,
    context: int | None = None,
    unfused: Sequence[Any] = (),
    fallbacks: Sequence[Any] = (),
    allowed: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest without its `files`; `ArtifactWriter` adds those when everything else is on disk.

    `source` is the model's name, not a path of this machine. `extra` adds further keys at the top; it replaces none.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "qcompiler": version(),
        "layout_version": LAYOUT_VERSION,
        "target": target,
        "kind": kind,
        "model": {"source": source, "type": model_type, "parameters": parameters},
        "recipe": recipe,
        "entry": entry,
        "inputs": [dict(value) for value in inputs],
        "outputs": [dict(value) for value in outputs],
        "cache": dict(cache) if cache is not None else None,
        "tokens": dict(tokens) if tokens is not None else None,
        "context": context,
        "unfused": list(unfused),
        "fallbacks": list(fallbacks),
        "allowed": dict(allowed or {}),
    }
    for key, value in (extra or {}).items():
        if key in manifest or key == "files":
            raise ValueError(f"extra manifest key {key!r} is already defined")
        manifest[key] = value
    return manifest


def dump_json(value: Any) -> str:
    """Canonical JSON of the artifact's files: sorted keys, two spaces, trailing newline; NaN and Inf are refused."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: canonical, with a hash of itself, so that a change in it shows like any other."""
    body = {key: value for key, value in manifest.items() if key != SEAL}
    return dump_json({**body, SEAL: hashlib.sha256(dump_json(body).encode()).hexdigest()}).encode()


def seal_holds(path: Path) -> bool:
    """Whether manifest.json is byte for byte what `seal` wrote."""
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        return isinstance(manifest, dict) and data == seal(manifest)
    except (ValueError, RecursionError):
        return False


def check_seal(path: Path) -> None:
    """Raise GateError unless `seal_holds`."""
    if not seal_holds(path):
        raise GateError(f"{path} is not as it was written: its own SHA-256 ({SEAL}) does not fit its content")


def read_ours(directory: Path) -> dict[str, Any] | None:
    """The manifest when `directory` carries one of our format (any schema), else None. Verifies nothing."""
    path = directory / NAME
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
