"""Options of the test run. Tests marked `slow` take minutes; they run with --slow, --exhaustive or `-m slow`."""

from __future__ import annotations

import os

import pytest
import torch

pytest_plugins = ["tests.runtime.kernel_report"]

if not torch.cuda.is_available():
    # For tests/gpu, and read when Triton is imported, which torch does too. Nothing else runs a kernel in Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--exhaustive", action="store_true", help="run everything, and whole grids of cases, not samples")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.slow or config.option.exhaustive or "slow" in (config.option.markexpr or ""):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether the run may take its time: parametrized grids in full instead of a sample."""
    return bool(request.config.getoption("--exhaustive"))
