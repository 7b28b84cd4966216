"""Tests of the GPU kernels: on a GPU where torch finds one, else in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from tests.gpu.parity import CUDA

if sys.platform != "linux":
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session", autouse=True)
def _interpreter_without_detours() -> None:
    """The interpreter puts its operators into `triton.language` anew in every call of a device function; once is enough."""
    if CUDA or find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(tl.sum.fn)  # of triton.language.core, which no kernel's own module names
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True)
def _needs_triton() -> Iterator[None]:
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):  # an interpreted kernel is numpy
        yield
