"""The programs of runtime/tests, linked here with the objects that a build of the library left behind.

Objects come from the build folder that QCOMPILER_OBJECTS names (as .ci/run does; they must be newer than every source), else from
one that cmake made here and ninja finds up to date. Without such tests are skipped, unless QCOMPILER_OBJECTS or "native" in
QCOMPILER_EXPECT asks for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.runtime import exercised

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "runtime" / "cpu"
COMPILER = os.environ.get("CXX", "c++")
# What each program consists of besides the library, and what of the library it brings itself.
PARTS = {
    "compare_kernels": (("calls", "cases", "compare_kernels", "guarded"), ("scratch.cpp.o",)),
    "compare_attention": (("calls", "cases", "compare_attention"), ()),
    "stress_kernels": (("calls", "cases", "stress_kernels"), ()),
}


def objects_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/qcompiler_cpu.dir/**/*.cpp.o"))


def newer_than_sources(folder: Path) -> bool:
    sources = [path for pattern in ("**/*.cpp", "**/*.h") for path in CPU.glob(pattern)]
    made = [path.stat().st_mtime for path in objects_in(folder)]
    return bool(made) and min(made) >= max(path.stat().st_mtime for path in sources)


def up_to_date(folder: Path) -> bool:
    if not (folder / "build.ninja").exists() or not shutil.which("ninja"):
        return False
    return "no work to do" in run("ninja", "-C", folder, "-n", "qcompiler_cpu", check=False).stdout


def objects() -> list[Path]:
    """The library's objects; skips or fails where there are none of today's sources."""
    if not shutil.which(COMPILER):
        unavailable(f"no compiler {COMPILER}")
    if named := os.environ.get("QCOMPILER_OBJECTS"):
        if not newer_than_sources(Path(named)):
            unavailable(f"QCOMPILER_OBJECTS is {named}: no objects there, or older than the sources")
        return objects_in(Path(named))
    for name in ("native", "native-programs"):
        if up_to_date(folder := ROOT / "runtime" / "build" / name):
            return objects_in(folder)
    unavailable("no objects of the library that are up to date (tools/test-kernels builds some)")


def unavailable(why: str) -> NoReturn:
    if os.environ.get("QCOMPILER_OBJECTS") or "native" in exercised.requested():
        pytest.fail(why)
    pytest.skip(why)


def link(folder: Path, name: str, library: list[Path]) -> Path:
    """Program `name` in a folder, where the objects of its own sources stay for the next one."""
    sources, without = PARTS[name]
    made = []
    for source in sources:
        made.append(folder / f"{source}.o")
        if not made[-1].exists():
            flags = ("-std=c++17", "-O1", "-ffp-contract=off", f"-I{CPU}")
            run(COMPILER, *flags, "-c", ROOT / "runtime" / "tests" / f"{source}.cpp", "-o", made[-1])
    kept = [path for path in library if path.name not in without]
    run(COMPILER, *made, *kept, "-static", "-pthread", "-o", folder / name)
    return folder / name


def run(*command: str | Path, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done
