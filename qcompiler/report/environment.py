"""The machine and the versions that are installed, found without importing them; and the versions that are tested."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qcompiler.artifact.manifest import version as own_version

# Package -> (oldest, first untested) versions; as in pyproject.toml, which a test compares.
RUN = {"numpy": ("1.26", "3"), "onnxruntime": ("1.21", "2"), "tokenizers": ("0.21", "1")}
COMPILE = {
    "torch": ("2.11", "3"),
    "transformers": ("5.23", "6"),
    "onnx": ("1.20", "2"),
    "onnxscript": ("0.5", "1"),
    "onnx-ir": ("0.1.12", "2"),
    "safetensors": ("0.5", "1"),
    "pydantic": ("2.10", "3"),
    "pyyaml": ("6", "7"),
}
OPTIONAL = {"rich": ("13", "16"), "jinja2": ("3.1.6", "4")}


def environment() -> dict[str, Any]:
    """What a compile ran on: versions, the Python, the system, the instruction set in use. Recorded, never compared."""
    from qcompiler.runtime import library

    return {
        "schema": 1,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": library.isa(),
        "versions": {"qcompiler": own_version(), **package_versions()},
    }


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that matters; None where it is missing."""
    return {name: installed(name) for name in (*RUN, *COMPILE, *OPTIONAL)}


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    # Builds of ONNX Runtime for accelerators have other names and the same module.
    names = (package, "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def in_range(found: str, oldest: str, untested: str) -> bool:
    """Whether `oldest <= found < untested`, by the leading numbers of each."""
    return _numbers(oldest) <= _numbers(found) < _numbers(untested)


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
