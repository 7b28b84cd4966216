"""Seconds that the solvers take on a GPU for the layers of one block of a 70B model, and for all of its blocks.

    ./tools/bench/gpu-solver --json solver.json
    ./tools/bench/gpu-solver --solvers 2D --layers gate,down --repeats 3
    ./tools/bench/gpu-solver --device cpu --shrink 32 --repeats 1      # whether it runs, on any machine

Random weights, and second moments of random inputs whose covariance has eigenvalues 1/i and a few channels 30 times as large, in
the sizes of the model: a layer's solver sees what it would see in a compile but for the weights' values. Layers of the same shape
are solved once and counted as often as a block has them. Times are of the solver alone, with the comparison that a compile makes:
no forward passes, no reading, no packing; a small solve before, which loads the libraries, does not count. `--json` is written
anew after each solve, so that a run that is cut leaves what it had, and `--budget` ends one by itself. `--shrink F` divides the
sizes by F.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qcompiler.errors import CapacityError, UsageError
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.gptvq import GptvqOptions, gptvq
from qcompiler.ops.formats import AffineFormat
from qcompiler.report import environment
from qcompiler.report.doctor import cpu_model
from qcompiler.report.tables import Column, Document, Table, Text
from tools.bench.artifacts import git
from tools.bench.command import Budget, Keep, tell
from tools.bench.command import run as run_command
from tools.bench.gptvq import shape_of
from tools.bench.gpu import gpu
from tools.bench.gpu import machine as gpu_machine

BLOCKS = 80
LEAST = 256  # rows and columns of a shrunk layer, which are multiples of it, and of the layer that is solved before
PUBLISHED_HOURS = (3, 11)  # of GPTVQ for a model of 70B on one H100, as its paper has them


@dataclass(frozen=True)
class Layer:
    """A weight `[n, k]` that a block has `count` times."""

    name: str
    n: int
    k: int
    count: int = 1

    def shrunk(self, factor: int) -> Layer:
        smaller = lambda size: max(LEAST, size // factor // LEAST * LEAST)  # noqa: E731
        return Layer(self.name, smaller(self.n), smaller(self.k), self.count)


LAYERS = (
    Layer("q, o", 8192, 8192, 2),
    Layer("k, v", 1024, 8192, 2),
    Layer("gate, up", 28672, 8192, 2),
    Layer("down", 8192, 28672),
)


def solvers() -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    """By name: what solves a weight with its second moments, as a compile does."""
    grid = AffineFormat(4, 128, symmetric=False)

    def vq(bits: str) -> Callable[[torch.Tensor, torch.Tensor], Any]:
        return lambda weight, hessian: gptvq(weight, hessian, shape_of(bits), GptvqOptions())

    return {
        "gptq int4-g128": lambda weight, hessian: gptq(weight, hessian, grid, GptqOptions()),
        "gptvq 2D 2.25": vq("vq2"),
        "gptvq 2D 3.125": vq("3.125"),
        "gptvq 4D 2.25": vq("vq2-4d"),
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(solvers())
    parser.add_argument("--solvers", default=",".join(solvers()), metavar="NAME,…", help=f"{known}, or parts of names [all]")
    parser.add_argument("--layers", default="all", metavar="NAME,…", help="some of q, k, gate, down [all]")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:N, or cpu [cuda]")
    parser.add_argument("--shrink", type=int, default=1, metavar="F", help="divide the layers' sizes [1]")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="solves that count [1]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs [0]")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which nothing new is solved [any]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    return run_command("gpu-solver", arguments, lambda keep: run(chosen, keep), report, chosen.json)


def run(chosen: argparse.Namespace, keep: Keep = lambda results: None) -> dict[str, Any]:
    """Every solver on every layer; `keep` is called with what there is after each.

    Raises:
        UsageError: an option that is not understood.
        UnsupportedError: no GPU.
        CapacityError: a layer that does not fit.
    """
    named = {name: solve for name, solve in solvers().items() if any(part in name for part in chosen.solvers.split(","))}
    if not named:
        raise UsageError(f"--solvers is {chosen.solvers!r}, expected some of {', '.join(solvers())}")
    if chosen.shrink < 1 or chosen.repeats < 1:
        raise UsageError(f"--shrink is {chosen.shrink} and --repeats {chosen.repeats}, expected at least 1")
    layers, budget = [layer.shrunk(chosen.shrink) for layer in asked_layers(chosen.layers)], Budget(chosen.budget)
    if chosen.device == "cpu":
        device = torch.device("cpu")
    else:
        device = gpu(chosen.device, "--device cpu --shrink 32 shows on any machine that it runs")
    measured: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "machine": described(device), "shrink": chosen.shrink, "repeats": chosen.repeats, "seed": chosen.seed,
        "measured": measured, "sums": [], "unmeasured": [f"{layer.name}: {name}" for layer in layers for name in named],
    }  # fmt: skip
    small = random_layer(Layer("small", LEAST, LEAST), device, chosen.seed)
    for solve in named.values():
        solve(*small)
    for layer in layers:
        if budget.spent:
            break
        tell(f"{layer.name}: {layer.n} x {layer.k}, weights and moments")
        try:
            weight, hessian = random_layer(layer, device, chosen.seed)
            for name, solve in named.items():
                if budget.spent:
                    break
                tell(f"{layer.name}: {name}")
                results["unmeasured"].remove(f"{layer.name}: {name}")
                found = timed(partial(solve, weight, hessian), device, chosen.repeats)
                measured.append({"layer": layer.name, "n": layer.n, "k": layer.k, "count": layer.count, "solver": name, **found})
                results["sums"] = sums(measured)
                keep(results)
            del weight, hessian
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise CapacityError(f"{layer.name} ({layer.n} x {layer.k}) does not fit on {device}: {reason}") from error
    return results


def asked_layers(text: str) -> list[Layer]:
    """The layers that have one of the names."""
    if text == "all":
        return list(LAYERS)
    wanted = text.split(",")
    known = {part: layer for layer in LAYERS for part in layer.name.split(", ")}
    for name in wanted:
        if name not in known:
            raise UsageError(f"unknown layer {name!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(known[name] for name in wanted))


# ---- measuring


def random_layer(layer: Layer, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight float32 `[n, k]` and second moments float32 `[k, k]` of twice as many inputs as k."""
    n, k = layer.n, layer.k
    generator = torch.Generator(device).manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, device=device) * torch.arange(1, k + 1, device=device).float().rsqrt()[:, None]
    mix[:, torch.randperm(k, generator=generator, device=device)[: max(1, k // 512)]] *= 30
    hessian, part = torch.zeros(k, k, device=device), 4096
    for start in range(0, 2 * k, part):
        x = torch.randn(min(part, 2 * k - start), k, generator=generator, device=device) @ mix
        hessian.addmm_(x.T, x)
    spread = 0.5 + torch.rand(n, 1, generator=generator, device=device)
    return torch.randn(n, k, generator=generator, device=device) * spread * k**-0.5, hessian / (2 * k)


def timed(solve: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of a solve; the most memory that the device held beside what it held before."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = solve()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    return {"seconds": median(seconds), "samples": seconds, "peak_bytes": peak, "fallback": result.fallback}


def sums(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of a block and of all blocks by solver; `whole`: whether all of a block's layers are in it."""
    made = []
    every = {layer.name for layer in LAYERS}
    for solver in dict.fromkeys(one["solver"] for one in measured):
        own = [one for one in measured if one["solver"] == solver]
        block = sum(one["count"] * one["seconds"] for one in own)
        whole = {one["layer"] for one in own} == every
        made.append({"solver": solver, "block_seconds": block, "model_seconds": BLOCKS * block, "whole": whole})
    return made


def described(device: torch.device) -> dict[str, Any]:
    """The machine."""
    if device.type == "cuda":
        return gpu_machine(device)
    about = {"device": cpu_model(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**about, "triton": environment.installed("triton"), "commit": git("rev-parse", "HEAD")}


# ---- telling


def report(results: dict[str, Any], command: list[str]) -> Document:
    machine = results["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, commit {machine['commit'][:10] or 'unknown'}; medians of "
        f"{results['repeats']} solves",
        "solver alone: no forward passes, no reading, no packing",
    ]
    if "driver" in machine:
        clocks = ", ".join(f"{name} {value}" for name, value in machine["clocks"].items())
        lines.append(f"driver {machine['driver']}, {clocks}, ECC {machine['ecc']}")
    if results["shrink"] > 1:
        lines.append(f"SHRUNK by {results['shrink']}: sizes are not those of the model, and the sums say nothing of it")
    if left := results["unmeasured"]:
        lines.append(f"NOT MEASURED, the run ended before: {', '.join(left)}")
    if any(one["fallback"] for one in results["measured"]):
        solved = ", ".join(f"{one['solver']} on {one['layer']}" for one in results["measured"] if one["fallback"])
        lines.append(f"kept rounding to nearest, which had the lower loss: {solved}")
    seconds = lambda value: f"{value:.2f}"  # noqa: E731
    gib = lambda value: f"{value / 2**30:.1f}"  # noqa: E731
    columns = (
        Column("solver"), Column("layer"), Column("n", right=True), Column("k", right=True), Column("in a block", right=True),
        Column("seconds", seconds, right=True), Column("peak, GiB", gib, right=True),
    )  # fmt: skip
    rows = [[o["solver"], o["layer"], o["n"], o["k"], o["count"], o["seconds"], o["peak_bytes"]] for o in results["measured"]]
    blocks: list[Table | Text] = [Text("", lines), Table("layers", columns, rows), _sums(results)]
    return Document("bench-gpu-solver", {"command": command, **results}, blocks)


def _sums(results: dict[str, Any]) -> Table:
    low, high = PUBLISHED_HOURS
    hours = lambda value: f"{value / 3600:.2f}"  # noqa: E731
    columns = (
        Column("solver"), Column("block, s", lambda v: f"{v:.1f}", right=True), Column(f"{BLOCKS} blocks, h", hours, right=True),
        Column("layers"),
    )  # fmt: skip
    layers = {True: "all of a block", False: "SOME of a block"}
    rows = [[one["solver"], one["block_seconds"], one["model_seconds"], layers[one["whole"]]] for one in results["sums"]]
    return Table(f"sums (published for 70B on one H100, with all else that it takes: {low} to {high} h)", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
