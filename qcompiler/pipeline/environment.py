"""The machine and the versions that a compile ran with; recorded, never compared."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "qcompiler",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "numpy",
    "safetensors",
    "tokenizers",
)


def environment() -> dict[str, Any]:
    """Versions of the packages that touch numerics, the Python, the system and the instruction set in use."""
    from qcompiler.runtime import library

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "schema": 1,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": library.isa(),
        "versions": versions,
    }
