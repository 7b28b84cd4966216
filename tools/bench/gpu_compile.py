"""Kernels compiled by several processes before they are measured: Triton keeps them on disk, where the measuring process looks.

A kernel takes a second or two, a run with every format some hundreds of them. A process goes through the shapes and numbers of
rows for which a side has the same kernel and configuration, since most of those share what is compiled.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace

import torch

from tools.bench import gpu_dispatch
from tools.bench.command import Budget, tell
from tools.bench.gpu_ours import Ours
from tools.bench.gpu_side import GpuCase

MOST = 16  # processes
PROCESS_BYTES = 3 * 2**30  # of the device: torch itself, and a product of the largest matrix

Task = tuple[Ours, list[GpuCase]]


def tasks(sides: Sequence[Ours], cases: Sequence[GpuCase], search: str) -> list[Task]:
    """What is to be called: a side with a choice of kernel, and the cases in which it is tried."""
    found: dict[tuple[str, str], Task] = {}
    for side in sides:
        for case in cases:
            named = search not in (gpu_dispatch.FEW, gpu_dispatch.ALL)
            for choice in [side.chosen(case)] if named else gpu_dispatch.candidates(side, case.rows, search):
                _, own = found.setdefault((side.name, choice.text), (replace(side, choice=choice), []))
                own.append(case)
    return list(found.values())


def call(side: Ours, cases: Sequence[GpuCase]) -> int:
    """Each case once; how many of them ran. What fails here fails again, and is told, when it is measured."""
    return sum(_called(side, cases))


def _called(side: Ours, cases: Sequence[GpuCase]) -> Iterator[bool]:
    for case in cases:
        try:
            with torch.inference_mode():
                side.opened(case)
        except Exception:
            yield False
        else:
            yield True


def compiled(sides: Sequence[Ours], cases: Sequence[GpuCase], search: str, jobs: int, budget: Budget) -> None:
    """Fill Triton's cache with what the sides run, as far as the budget goes: half of it is for measuring.

    Args:
        jobs: processes at most; fewer where the device's memory is small, and none for a single task.
    """
    todo = tasks(sides, cases, search)
    free = torch.cuda.mem_get_info()[0] if cases and cases[0].device.type == "cuda" else PROCESS_BYTES * jobs
    jobs = min(jobs, len(todo), free // PROCESS_BYTES)
    if jobs < 2:
        return
    tell(f"compiling: {len(todo)} kernels and configurations by {jobs} processes")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(call, *task) for task in todo]
        _, late = wait(futures, None if budget.left is None else budget.left / 2)
        if late:
            tell(f"compiling: {len(late)} were not ready in half of the budget; they are compiled when they are measured")
            for process in list((pool._processes or {}).values()):
                process.terminate()
