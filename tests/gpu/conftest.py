"""Tests of the GPU kernels: on a GPU where torch finds one, else in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

if sys.platform != "linux":
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def _needs_triton() -> Iterator[None]:
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):  # an interpreted kernel is numpy
        yield
