"""Speed of the GPU kernels in every format, beside float16 and bfloat16 torch.matmul, a device copy and other programs.

    ./tools/bench/gpu --json gpu.json --budget 480
    ./tools/bench/gpu --formats int4-g128,vq3 --peers none --rows 1,16 --shapes 8192x8192
    ./tools/bench/gpu --search all --write-dispatch dispatch.json

Every side is captured in a CUDA graph that goes through as many matrices as no second cache holds; what is shown is the median
over replays. Few rows are measured before many, on every shape; `--json` is written anew after each number of rows and shape, so
that a run that is cut leaves what it had, and `--budget` ends one by itself. Kernels are compiled by `--jobs` processes at once
before anything is measured; Triton keeps them on disk, so that a second run begins at once. `--search` tries kernels and
configurations in place of those that the dispatch table names, and shows the fastest; `--write-dispatch` makes a table of them,
which the environment variable QCOMPILER_GPU_DISPATCH or a copy into the package puts to use. Peers that are not installed are
skipped with a word. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.report import environment
from qcompiler.runtime.device import find_device
from tools.bench import gpu_compile, gpu_dispatch, gpu_peers, gpu_report, gpu_timing
from tools.bench.artifacts import git
from tools.bench.command import Budget, Keep, names, numbers, shapes, tell
from tools.bench.command import run as run_command
from tools.bench.gpu_ours import ACTIVATIONS, FORMATS, Ours, activation_of
from tools.bench.gpu_side import TOLERANCE, GpuCase, GpuSide, Opened, Skipped

SHAPES, ROWS = "4096x4096,8192x8192,4096x14336,16384x16384", "1,4,16,64,256,4096"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NAMED = "table"
SEARCHES = (NAMED, gpu_dispatch.FEW, gpu_dispatch.ALL)
QUERY = ("driver_version", "clocks.current.sm", "clocks.current.memory", "clocks.max.sm", "clocks.max.memory", "ecc.mode.current")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="NAME,…", help="ours, or none [all]")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS), metavar="NAME,…", help="of ours: float, int8 [both]")
    parser.add_argument("--dtypes", default="float16", metavar="NAME,…", help="of ours: float16, bfloat16 [float16]")
    programs = ", ".join(gpu_peers.FAMILIES)
    parser.add_argument("--peers", default="all", metavar="NAME,…", help=f"none, all, some sides, or some of {programs} [all]")
    parser.add_argument("--rows", default=ROWS, metavar="N,…", help=f"of the activations [{ROWS}]")
    parser.add_argument("--shapes", default=SHAPES, metavar="NxK,…", help=f"outputs x inputs [{SHAPES}]")
    parser.add_argument("--search", choices=SEARCHES, help="what is measured of ours [table; few with --write-dispatch]")
    parser.add_argument("--replays", type=int, default=30, metavar="N", help="of each graph [30]")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which nothing new is measured [any]")
    jobs = min(gpu_compile.MOST, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help=f"processes that compile kernels [{jobs}]")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda or cuda:N [cuda]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    parser.add_argument("--write-dispatch", type=Path, metavar="FILE", help="where a dispatch table of the fastest goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    write_table = lambda results, path: path.write_text(json.dumps(gpu_dispatch.proposed(results), indent=1) + "\n")  # noqa: E731
    return run_command(
        "gpu", arguments, lambda keep: run(chosen, keep), gpu_report.document, chosen.json, [(chosen.write_dispatch, write_table)]
    )


def run(chosen: argparse.Namespace, keep: Keep = lambda results: None) -> dict[str, Any]:
    """Everything measured: the machine, its copy rate, a setting for every shape and number of rows, what was skipped.

    Args:
        keep: is called with that after each setting.

    Raises:
        UsageError: an option that is not understood.
        UnsupportedError: no GPU, or one that the kernels do not run on.
    """
    sizes, rows = shapes("shapes", chosen.shapes), numbers("rows", chosen.rows)
    sides = [*gpu_peers.sides(chosen.peers), *ours(chosen)]
    if chosen.replays < 2:
        raise UsageError(f"--replays is {chosen.replays}, expected at least 2")
    if chosen.jobs < 0:
        raise UsageError(f"--jobs is {chosen.jobs}, expected 0 or more")
    if chosen.device == "cpu":
        raise UsageError("--device is 'cpu', expected cuda or cuda:N: this measures a GPU, tools/bench/kernels a CPU")
    budget, device = Budget(chosen.budget), gpu(chosen.device)
    search = chosen.search or (gpu_dispatch.FEW if chosen.write_dispatch else NAMED)
    cases = [GpuCase(n, k, row, device) for row in rows for n, k in sizes]
    cold = gpu_timing.cold_bytes(device)
    results: dict[str, Any] = {
        "machine": machine(device), "copy": None, "cold_bytes": cold, "replays": chosen.replays, "search": search, "skipped": {},
        "unmeasured": [f"{case.title}: {side.name}" for case in cases for side in sides], "settings": [],
    }  # fmt: skip
    with torch.cuda.device(device), torch.inference_mode():
        results["copy"] = gpu_timing.copy_rate(device, chosen.replays)
        gpu_compile.compiled([side for side in sides if isinstance(side, Ours)], cases, search, chosen.jobs, budget)
        for case in cases:
            measured = dict(_setting(case, sides, chosen.replays, search, budget, results))
            if measured:
                found = gpu_report.setting(case.n, case.k, case.rows, measured, results["copy"])
                results["settings"].append(found)
                keep(results)
    return results


# ---- measuring


def _setting(
    case: GpuCase, sides: list[GpuSide], replays: int, search: str, budget: Budget, results: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of the sides that run, as long as there is time; those that do not are noted in the results."""
    skipped: dict[str, str] = results["skipped"]
    for side in sides:
        if budget.spent:
            return
        title = f"{case.title}: {side.name}"
        tell(title)
        results["unmeasured"].remove(title)
        try:
            yield side.name, measure(side, case, replays, search, results["cold_bytes"])
        except Skipped as reason:
            if str(reason) != skipped.get(side.name):
                skipped[side.name if side.name not in skipped and not results["settings"] else title] = str(reason)
            tell(f"  skipped: {reason}")


def measure(
    side: GpuSide, case: GpuCase, replays: int, search: str = NAMED, cold: int = gpu_timing.COLD_BYTES
) -> dict[str, Any]:
    """One side of a setting; of ours the fastest of what is tried. `cold`: bytes of the matrices of a side.

    Raises:
        Skipped: it does not run, or its product is wrong.
    """
    if not isinstance(side, Ours):
        return timed(side, case, replays, cold)
    about = {"op": side.op, "format": side.format.label, "activation": activation_of(side.activations, side.format).label}
    if search == NAMED:
        return {**timed(side, case, replays, cold), **about}
    tried: list[dict[str, Any]] = []
    wrong: list[str] = []
    for choice in gpu_dispatch.candidates(side, case.rows, search):
        try:
            tried.append(timed(replace(side, choice=choice), case, replays, cold))
        except Skipped as reason:
            wrong.append(f"{choice.text}: {reason}")
    if not tried:
        raise Skipped("; ".join(wrong))
    best = min(tried, key=lambda one: one["seconds"]["median"])
    others = [{"kernel": t["kernel"], "config": t["config"], "seconds": t["seconds"]["median"]} for t in tried]
    return {**best, **about, "tried": others, "failed": wrong}


def timed(side: GpuSide, case: GpuCase, replays: int, cold: int) -> dict[str, Any]:
    """A side opened, its product checked, its graph replayed.

    Raises:
        Skipped: it does not run, or its product is wrong.
    """
    try:
        opened = side.open(case, partial(gpu_timing.copies, cold=cold))
        return _checked(opened, opened.error(), replays) | {"family": side.family}
    except torch.OutOfMemoryError as error:
        raise Skipped(f"out of memory: {str(error).splitlines()[0]}") from error
    except Skipped:
        raise
    except Exception as error:  # another program's, or a configuration that does not compile: the run goes on without it
        raise Skipped(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def _checked(opened: Opened, error: float, replays: int) -> dict[str, Any]:
    if not error <= TOLERANCE:
        raise Skipped(f"its product is off by {error:.2g} of the float product of its own weights, expected at most {TOLERANCE}")
    seconds = gpu_timing.spread(gpu_timing.samples(opened.calls, replays))
    found = {"matrix_bytes": opened.matrix_bytes, "matrices": len(opened.calls), "error": error, "seconds": seconds}
    return found | opened.about


# ---- the machine


def gpu(name: str, instead: str = "tools/bench/kernels measures a CPU") -> torch.device:
    """The GPU of that name.

    Raises:
        UnsupportedError: there is none that the kernels run on; says why, and what there is instead.
    """
    try:
        return find_device(name)
    except UnsupportedError as error:
        raise UnsupportedError(f"nothing was measured: {str(error).removesuffix(', or use cpu')}; {instead}") from error


def machine(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks, ECC, versions: what a figure cannot be read without."""
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)  # numbers of nvidia-smi are not torch's where only some GPUs are visible
    asked = smi(f"GPU-{uuid}" if uuid else str(device.index or 0))
    return {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "driver": asked["driver_version"], "ecc": asked["ecc.mode.current"],
        "clocks": {name.removeprefix("clocks."): value for name, value in asked.items() if name.startswith("clocks.")},
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": environment.installed("triton"),
        "commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno")),
    }  # fmt: skip


def smi(gpu: str, run: Any = subprocess.run) -> dict[str, str]:
    """What nvidia-smi says of a GPU, by its number or UUID; `unknown` where it does not."""
    try:
        command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        done = run(command, capture_output=True, text=True)
        values = [value.strip() for value in done.stdout.strip().split(",")] if done.returncode == 0 else []
    except OSError:
        values = []
    if len(values) != len(QUERY):
        values = ["unknown"] * len(QUERY)
    return dict(zip(QUERY, values, strict=True))


# ---- what is asked for


def ours(chosen: argparse.Namespace) -> list[Ours]:
    """Our sides."""
    formats = names("format", chosen.formats, FORMATS)
    kinds, dtypes = names("kind of activations", chosen.activations, ACTIVATIONS), names("type", chosen.dtypes, DTYPES)
    return [Ours(name, kind, DTYPES[dtype]) for name in formats for kind in kinds for dtype in dtypes]


if __name__ == "__main__":
    sys.exit(main())
