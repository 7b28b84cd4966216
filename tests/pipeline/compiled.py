"""The reference model compiled once a test run: `reference("int4")`."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import qcompiler


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def reference(recipe: str, target: str = "onnx") -> qcompiler.CompileResult:
    return qcompiler.compile("reference", output=_folder() / f"{recipe}-{target}", recipe=recipe, target=target, samples=2, length=64)
