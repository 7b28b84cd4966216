"""What `doctor` finds: machine, kernels, packages, and whether artifacts can run."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from qcompiler.artifact.manifest import version
from qcompiler.errors import QCompilerError, UnsupportedError
from qcompiler.report import environment, gpus
from qcompiler.report.tables import Column, Document, Table, Text


def diagnose() -> tuple[Document, int]:
    """The report, and the exit code: 0 when running artifacts is possible."""
    machine = {
        "qcompiler": version(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    packages = _packages()
    problems: list[tuple[str, int]] = []
    for entry in packages:
        if entry["for"] == "run" and entry["state"] == "missing":
            problems.append(
                (f"{entry['package']} is missing: pip install {entry['package']}", UnsupportedError.exit_code)
            )
        elif entry["for"] == "run" and entry["state"] == "too old":
            problems.append(
                (f"{entry['package']} is {entry['version']}, expected {entry['tested']}", UnsupportedError.exit_code)
            )
    kernels = _kernels(problems)
    gpu = gpus.gpus()
    code = problems[0][1] if problems else 0
    data = {
        "machine": machine,
        "kernels": kernels,
        "gpu": gpu,
        "packages": packages,
        "can_run": not problems,
        "can_compile": not problems
        and all(e["state"] not in ("missing", "too old") for e in packages if e["for"] != "extra"),
        "problems": [text for text, _ in problems],
    }
    verdict = ["artifacts can run here"] if not problems else [f"cannot run: {text}" for text, _ in problems]
    if not problems and not data["can_compile"]:
        verdict.append("compiling needs more: pip install 'qcompiler[compile]'")
    blocks: list[Table | Text] = [
        Text("machine", _aligned(machine)),
        Text("kernels", _aligned(kernels) if kernels else ["none: the op library cannot be loaded"]),
        Text("GPU", gpus.lines(gpu)),
        Table(
            "packages",
            (Column("package"), Column("version"), Column("tested"), Column("for"), Column("state")),
            [(e["package"], e["version"], e["tested"], e["for"], e["state"]) for e in packages],
        ),
        Text("", verdict),
    ]
    return Document("doctor", data, blocks), code


def cpu_model() -> str:
    """The processor by its maker's name where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("model name", "Model", "Hardware"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    except OSError:
        pass
    return " ".join(dict.fromkeys(part for part in (platform.processor(), platform.machine()) if part)) or "unknown"


def _kernels(problems: list[tuple[str, int]]) -> dict[str, Any]:
    """What the op library says of itself; what keeps it from loading becomes a problem."""
    try:
        from qcompiler.runtime import library

        return {
            "library": str(library.library_path()),
            "interface": library.ABI_VERSION,
            "layout": library.LAYOUT_VERSION,
            "features": list(library.cpu_features()),
            "available": list(library.isas()),
            "chosen": library.isa(),
        }
    except QCompilerError as error:
        problems.append((str(error), error.exit_code))
    except ImportError as error:  # numpy itself is missing; it is already among the packages
        if not problems:
            problems.append((str(error), UnsupportedError.exit_code))
    return {}


def _packages() -> list[dict[str, Any]]:
    result = []
    groups = (("run", environment.RUN), ("compile", environment.COMPILE), ("extra", environment.OPTIONAL))
    for purpose, packages in groups:
        for name, (oldest, untested) in packages.items():
            found = environment.installed(name)
            if found is None:
                state = "missing"
            elif environment.in_range(found, oldest, untested):
                state = "found"
            else:
                state = "newer than tested" if environment.in_range(found, untested, "999999") else "too old"
            tested = f">={oldest},<{untested}"
            result.append({"package": name, "version": found, "tested": tested, "for": purpose, "state": state})
    return result


def _aligned(values: dict[str, Any]) -> list[str]:
    width = max(map(len, values))
    return [f"{k:<{width}}  {', '.join(v) if isinstance(v, list) else v}" for k, v in values.items()]
