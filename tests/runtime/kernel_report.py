"""The end of a test run says which kernels of which instruction sets were exercised; one that had to be and was not fails it.

A plugin of the whole run (tests/conftest.py): where tests run in several processes, each tells the first one what it ran.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime import exercised
from tests.runtime.kernel_library import find_library

# Where kernels run: only a run of all of these can say that one is missing.
FILES = {"test_isas.py", "test_kernels.py", "test_vq_kernels.py", "test_neon.py"}
COLLECTED: set[str] = set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    COLLECTED.update(item.path.name for item in items if item.path.parent == here)


def complete(config: pytest.Config) -> bool:
    option = config.option
    chosen = option.keyword or option.markexpr or option.collectonly or getattr(option, "lf", False)
    return COLLECTED >= FILES and not chosen and not any("::" in arg for arg in config.args)


def executable() -> list[str]:
    from tests.runtime.test_kernels import ISAS, LIBRARY

    return ISAS if LIBRARY else []


def missing() -> list[tuple[str, str]]:
    return [kernel for kernel in exercised.expected(executable()) if kernel not in exercised.RAN]


def interrupted(session: pytest.Session) -> bool:
    return bool(session.shouldstop or session.shouldfail) or session.exitstatus not in (0, 1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (said := getattr(session.config, "workeroutput", None)) is not None:
        said["kernels"] = {"ran": sorted(exercised.RAN), "collected": sorted(COLLECTED)}
    elif complete(session.config) and not interrupted(session) and missing():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, in the first process
def pytest_testnodedown(node, error: object) -> None:
    said = getattr(node, "workeroutput", {}).get("kernels", {"ran": [], "collected": []})
    exercised.RAN.update((isa, op) for isa, op in said["ran"])
    COLLECTED.update(said["collected"])


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    if not exercised.RAN:
        return
    compiled = dict.fromkeys((*exercised.COMPILED, *(isa for isa, _ in exercised.RAN)))
    total = sum(len(exercised.kernels(isa)) for isa in compiled)
    terminalreporter.section("kernels")
    terminalreporter.write_line(f"{len(exercised.RAN)} of {total} kernels exercised ({find_library()})")
    expected = exercised.expected(executable())
    for isa in compiled:
        ran = {op for name, op in exercised.RAN if name == isa}
        lacks = [op for name, op in exercised.kernels(isa) if op not in ran]
        text = f"  {isa:12} {len(ran)} of {len(exercised.kernels(isa))}"
        if lacks and (isa, lacks[0]) not in expected and not ran:
            text += ": not executable here"
        elif lacks:
            text += f": without {', '.join(lacks)}"
        terminalreporter.write_line(text)
    if complete(config) and missing():
        names = ", ".join(f"{isa} {op}" for isa, op in missing())
        terminalreporter.write_line(
            f"expected, and not exercised: {names} (this CPU executes them, or QCOMPILER_EXPECT names them)", red=True
        )
