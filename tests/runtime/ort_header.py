"""Where ONNX Runtime's official C and C++ headers lie, if anywhere on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def find_header(name: str) -> Path:
    """The header's path; skips the test that asks where there is none.

    It comes with Debian's libonnxruntime-dev, conda-forge's onnxruntime-cpp or a release archive; ORT_INCLUDE names its
    folder when it lies elsewhere.
    """
    roots = [Path(place) for place in (os.environ.get("ORT_INCLUDE"), os.environ.get("CPATH")) if place]
    roots += [
        Path(sys.prefix) / "include",
        Path("/usr/include"),
        Path("/usr/local/include"),
        Path("/opt/homebrew/include"),
    ]
    if conda := os.environ.get("CONDA_PREFIX"):
        roots.append(Path(conda) / "include")
    for root in roots:
        for below in ("", "onnxruntime", "onnxruntime/core/session"):
            if (root / below / name).is_file():
                return root / below / name
    pytest.skip(f"no {name} found; ORT_INCLUDE names the folder that has one")
