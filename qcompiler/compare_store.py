"""What a comparison keeps in its directory: `compare.json`, with the measurements of every recipe and what they depend on.

A measurement is used again while its key is the same: a hash over everything that it depends on. The key of a compile covers the
checkpoint's files, the recipe as resolved, the calibration text and samples, the target, and the versions of the packages that
compile; that of an evaluation also the evaluation's text and windows; that of the speeds also the machine, and the recipes that
they were measured beside.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.artifact.files import digest
from qcompiler.artifact.manifest import NAME as MANIFEST
from qcompiler.artifact.manifest import dump_json, version
from qcompiler.artifact.writer import ArtifactWriter
from qcompiler.errors import InputError, QCompilerError
from qcompiler.recipe.schema import Recipe
from qcompiler.report.environment import installed
from qcompiler.runtime.artifact import open_artifact, verify_files

FILE = "compare.json"
SCHEMA = 1

# Packages whose version decides what a compile writes or what an evaluation finds.
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tokenizers")

# What lies in a checkpoint's directory and is read.
_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def key(*parts: Any) -> str:
    """SHA-256 of what JSON makes of `parts`."""
    return hashlib.sha256(dump_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


def base_key(checkpoint: Path) -> str:
    """Key of everything that no option changes: the checkpoint's files and the versions."""
    files = {path.name: digest(path)["sha256"] for pattern in _READ for path in checkpoint.glob(pattern) if path.is_file()}
    return key(SCHEMA, version(), {name: installed(name) for name in _PACKAGES}, files)


@dataclass
class Run:
    """One recipe of a comparison.

    Attributes:
        recipe: as resolved.
        key: of its compile.
        path: where its artifact goes.
        found: measurements by kind (`compile`, `evaluation`, `speed`), each with its `key`.
        reused: the kinds that an earlier comparison had found.
        error: what it ended with, or None.
    """

    recipe: Recipe
    key: str
    path: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    error: QCompilerError | None = None

    @property
    def name(self) -> str:
        return self.recipe.name

    def has(self, kind: str, key: str) -> bool:
        """Whether a measurement is there and may be used; then it counts as reused."""
        if self.found.get(kind, {}).get("key") != key:
            return False
        self.reused.add(kind)
        return True


class Store:
    """The directory of a comparison.

    Raises:
        InputError: its `compare.json` is not one of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._runs: dict[str, dict[str, Any]] = self._read()

    def run(self, recipe: Recipe, key: str, source: Path) -> Run:
        """A recipe's run with what is known of it.

        Raises:
            InputError: the place of its artifact is taken by something that no comparison has made.
        """
        run = Run(recipe, key, self.folder / recipe.name)
        known = self._runs.get(run.name)
        if known is None and os.path.lexists(run.path):
            raise InputError(
                f"{run.path} is there already and not from a comparison ({FILE} does not know it); "
                "choose another output directory, or move it away"
            )
        ArtifactWriter(run.path, overwrite=True, source_dir=source).check()
        run.found = dict(known or {})
        if run.found.get("compile", {}).get("key") != key or not self._is_sound(run):
            run.found = {}
        return run

    def save(self, run: Run) -> None:
        """Write what was found so far; an interruption loses nothing that was saved."""
        self._runs[run.name] = run.found
        aside = self._path.with_name(f".{FILE}.{os.getpid()}")
        # A wrecked model's perplexity may be infinite, which is no JSON but what Python reads back.
        aside.write_text(json.dumps({"schema": SCHEMA, "runs": self._runs}, indent=2, sort_keys=True), encoding="utf-8")
        os.replace(aside, self._path)

    def _is_sound(self, run: Run) -> bool:
        """Whether the artifact is there, is the one that was measured, and every byte of it is as it was written."""
        try:
            if digest(run.path / MANIFEST)["sha256"] != run.found["compile"]["manifest"]:
                return False
            verify_files(open_artifact(run.path))
        except (QCompilerError, OSError):
            return False
        return True

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        try:
            content = json.loads(self._path.read_bytes())
            runs = {str(name): dict(found) for name, found in content["runs"].items()}
            schema = content["schema"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self._path} cannot be read as the record of a comparison ({type(error).__name__}: {error}); "
                "choose another output directory, or remove it and the artifacts beside it"
            ) from error
        if schema != SCHEMA:
            raise InputError(f"{self._path} has schema {schema!r}, expected {SCHEMA}; choose another output directory")
        return runs
