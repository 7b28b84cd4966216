"""Tests of the GPU kernels: on a GPU where torch finds one, else in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from tests.gpu import interpreter
from tests.gpu.parity import CUDA

if sys.platform != "linux":
    collect_ignore_glob = ["*.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:  # of tests/gpu/every_case.py
        metafunc.parametrize("part", metafunc.module.PARTS, ids="-".join)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_without_detours() -> None:
    if not CUDA and find_spec("triton") is not None:
        interpreter.shorten()


@pytest.fixture(autouse=True)
def _needs_triton() -> Iterator[None]:
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):  # an interpreted kernel is numpy
        yield
