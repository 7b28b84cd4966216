"""The reference model compiled once a test run: `reference("int4")`."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import qcompiler
from qcompiler import recipe as recipes


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def reference(recipe: str, target: str = "onnx", own_attention: bool = True) -> qcompiler.CompileResult:
    """`own_attention`: as in a recipe."""
    return _compiled(recipe, target, own_attention)


# Behind a function, so that a default and the same value given are one entry.
@functools.cache
def _compiled(recipe: str, target: str, own_attention: bool) -> qcompiler.CompileResult:
    output = _folder() / f"{recipe}-{target}{'' if own_attention else '-stock-attention'}"
    chosen = dataclasses.replace(recipes.load(recipe), own_attention=own_attention)
    return qcompiler.compile("reference", output=output, recipe=chosen, target=target, samples=2, length=64)
