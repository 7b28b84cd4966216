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


def reference(recipe: str, target: str = "onnx") -> qcompiler.CompileResult:
    return _compiled(recipe, target)


# Behind a function, so that a default and the same value given are one entry.
@functools.cache
def _compiled(recipe: str, target: str) -> qcompiler.CompileResult:
    output = _folder() / f"{recipe}-{target}"
    return qcompiler.compile("reference", output=output, recipe=recipe, target=target, samples=2, length=64)
