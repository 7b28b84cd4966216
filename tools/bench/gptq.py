"""Layer error and seconds of the GPTQ solver beside the published algorithm, on the same weights and Hessians.

    ./tools/bench/gptq --bits 4,3 --threads 1 --repeats 5 --json gptq.json

Layers: every projection of the bundled reference model, with second moments of what the calibration text feeds it, and
random layers with a spectrum that decays as 1/i and a few channels 30 times as large. Both sides get asymmetric grids with
groups of 128 and the same Hessian; the error is tr(D H Dᵀ). `held-out` is the same error under second moments of other
text (other samples for random layers), which no solver saw. A round solves a layer with each side in random order.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from qcompiler.data import reference_model
from qcompiler.evaluate.calibration import calibration_batches
from qcompiler.evaluate.text import evaluation_text
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.hessian import layer_loss
from qcompiler.ops.formats import AffineFormat
from qcompiler.report import tables
from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.tables import Column, Document, Table, Text
from tools.bench.gptq_published import published_gptq

GROUP = 128
SAMPLES, LENGTH = 64, 256  # calibration windows of the reference model
PUBLISHED = "published"
# `same`: only the grid's fit and the arithmetic differ. `defaults`: as compiled, without the comparison with rounding to
# nearest, which the published algorithm does not make. `checked`: with it, which is what a compile runs.
OURS = {
    "same grid": GptqOptions(passes=1, groups="live", clipping="minmax", ordering="none", importance="uniform", compare=False),
    "defaults": GptqOptions(compare=False),
    "3 sweeps": GptqOptions(compare=False, passes=3),
    "checked": GptqOptions(),
}


@dataclass(frozen=True)
class Layer:
    """`weight` `[n, k]`; `hessian` and `held_out` float32 `[k, k]`."""

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor
    held_out: torch.Tensor


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4,3,2", metavar="N,…", help="[4,3,2]")
    parser.add_argument("--random", default="4096x4096", metavar="NxK,…", help="sizes of random layers, or none [4096x4096]")
    parser.add_argument("--no-reference", action="store_true", help="without the layers of the reference model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="[all]")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds [3]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random layers and the order [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    order = random.Random(chosen.seed)
    cases = []
    for layer in layers(chosen):
        for bits in map(int, chosen.bits.split(",")):
            print(f"{layer.name}, {bits} bits", file=sys.stderr, flush=True)
            cases.append(measure(layer, bits, chosen.repeats, order))
    document = report(cases, chosen)
    if chosen.json:
        chosen.json.write_text(document.to_json() + "\n")
    tables.show(document)
    return 0


# ---- layers


def layers(chosen: argparse.Namespace) -> Iterator[Layer]:
    if not chosen.no_reference:
        yield from reference_layers()
    if chosen.random != "none":
        for size in chosen.random.split(","):
            n, k = map(int, size.split("x"))
            yield random_layer(n, k, chosen.seed)


def reference_layers() -> Iterator[Layer]:
    """Every projection inside the blocks of the reference model."""
    from transformers import AutoModelForCausalLM

    path = reference_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen = calibration_batches(path, samples=SAMPLES, length=LENGTH)
    other = calibration_batches(path, evaluation_text(), samples=SAMPLES, length=LENGTH)
    hessians, held_out = _moments(model, seen), _moments(model, other)
    for name, module in model.named_modules():
        if name in hessians:
            yield Layer(name.removeprefix("model.layers."), module.weight.detach(), hessians[name], held_out[name])


@torch.inference_mode()
def _moments(model: torch.nn.Module, windows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}

    def observe(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    handles = [module.register_forward_pre_hook(observe(name)) for name, module in found]
    for window in windows:
        model(torch.from_numpy(window)[None])
    for handle in handles:
        handle.remove()
    tokens = sum(map(len, windows))
    return {name: (total / tokens).float().clone() for name, total in sums.items()}


def random_layer(n: int, k: int, seed: int) -> Layer:
    """Inputs with a covariance of eigenvalues 1/i, and k/512 channels 30 times as large; twice as many tokens as k."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.arange(1, k + 1).float().rsqrt()[:, None]
    mix[:, torch.randperm(k, generator=generator)[: max(1, k // 512)]] *= 30
    moments = []
    for _ in range(2):
        total = torch.zeros(k, k)
        for _ in range(2):
            x = torch.randn(k, k, generator=generator) @ mix
            total.addmm_(x.T, x)
        moments.append(total / (2 * k))
    weight = torch.randn(n, k, generator=generator) * (0.5 + torch.rand(n, 1, generator=generator)) * k**-0.5
    return Layer(f"random {n}x{k}", weight, *moments)


# ---- measuring


def measure(layer: Layer, bits: int, repeats: int, order: random.Random) -> dict[str, Any]:
    """Losses and seconds of one layer, all sides."""
    format = AffineFormat(bits, GROUP, symmetric=False)
    solvers: dict[str, Callable[[], torch.Tensor]] = {PUBLISHED: lambda: published_gptq(layer.weight, layer.hessian, bits, GROUP)}
    fallbacks: list[str] = []

    def ours(chosen: GptqOptions) -> Callable[[], torch.Tensor]:
        def solve() -> torch.Tensor:
            result = gptq(layer.weight, layer.hessian, format, chosen)
            if result.fallback:
                fallbacks.append(result.fallback)
            return result.weight

        return solve

    solvers |= {name: ours(chosen) for name, chosen in OURS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in solvers}
    losses: dict[str, dict[str, float]] = {}
    for index in range(repeats + 1):
        for name in order.sample(list(solvers), len(solvers)):
            start, cpu = time.perf_counter(), time.process_time()
            solved = solvers[name]()
            taken, cpu = time.perf_counter() - start, time.process_time() - cpu
            if index:  # the first round warms up, and tells the losses: they are the same in every round
                seconds[name].append(taken)
                cpu_seconds[name].append(cpu)
                continue
            dequantized = solved if isinstance(solved, torch.Tensor) else solved.dequantize()
            losses[name] = {
                "loss": layer_loss(layer.weight, dequantized, layer.hessian.double()),
                "held_out": layer_loss(layer.weight, dequantized, layer.held_out.double()),
            }
    sides = {
        name: {
            **losses[name], "seconds": median(seconds[name]), "cpu_seconds": median(cpu_seconds[name]), "samples": seconds[name],
        } for name in solvers
    }  # fmt: skip
    ratios = {name: median(a / b for a, b in zip(seconds[name], seconds[PUBLISHED], strict=True)) for name in OURS}
    return {
        "layer": layer.name, "rows": layer.weight.shape[0], "columns": layer.weight.shape[1], "bits": bits,
        "sides": sides, "time_ratios": ratios, "fallbacks": fallbacks,
    }  # fmt: skip


# ---- telling


def report(cases: list[dict[str, Any]], chosen: argparse.Namespace) -> Document:
    machine = {"cpu": cpu_model(), "processors": os.cpu_count(), "load": os.getloadavg()[0], **environment()}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = git.stdout.strip()
    data = {
        "command": sys.argv[1:], "commit": commit, "machine": machine, "threads": chosen.threads, "rounds": chosen.repeats,
        "group": GROUP, "options": {name: repr(value) for name, value in OURS.items()}, "cases": cases, "sums": _sums(cases),
    }  # fmt: skip
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors (load {machine['load']:.1f}), {chosen.threads} threads, torch "
        f"{machine['versions'].get('torch')}, commit {commit[:10]}",
        f"asymmetric, groups of {GROUP}; medians of {chosen.repeats} interleaved rounds",
        "columns of ours are ratios to published: below 1 ours has the lower loss, or takes less time",
        "cpu: time of all threads together, which other programs on the machine disturb less",
    ]
    return Document("bench-gptq", data, [Text("", lines), _table("layers", cases), _table("sums", data["sums"])])


def _sums(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the layers of the reference model, for each number of bits, with the worst layer's ratio."""
    sums = []
    for bits in dict.fromkeys(case["bits"] for case in cases):
        same = [case for case in cases if case["bits"] == bits and not case["layer"].startswith("random")]
        if not same:
            continue
        sides = {
            name: {key: sum(case["sides"][name][key] for case in same) for key in ("loss", "held_out", "seconds", "cpu_seconds")}
            for name in (PUBLISHED, *OURS)
        }
        worst = {
            name: max(case["sides"][name]["loss"] / case["sides"][PUBLISHED]["loss"] for case in same) for name in OURS
        }
        ratios = {name: sides[name]["seconds"] / sides[PUBLISHED]["seconds"] for name in OURS}
        sums.append({"layer": f"sum of {len(same)}", "bits": bits, "sides": sides, "time_ratios": ratios, "worst": worst})
    return sums


def _table(title: str, cases: list[dict[str, Any]]) -> Table:
    ratio = lambda value: f"{value:.3f}"  # noqa: E731
    columns = [Column("layer"), Column("bits", right=True), Column("published loss", lambda v: f"{v:.4g}", right=True)]
    columns += [Column("seconds", ratio, right=True)]
    for name in OURS:
        if name != "checked":
            columns += [Column(f"{name}: loss", ratio, right=True), Column("held-out", ratio, right=True)]
        columns += [Column(f"{name}: time", ratio, right=True), Column("cpu", ratio, right=True)]
    worst = title == "sums"
    if worst:
        columns.append(Column("worst loss", ratio, right=True))
    rows = []
    for case in cases:
        published = case["sides"][PUBLISHED]
        row = [case["layer"], case["bits"], published["loss"], published["seconds"]]
        for name in OURS:
            if name != "checked":
                row += [case["sides"][name][key] / published[key] for key in ("loss", "held_out")]
            row += [case["time_ratios"][name], case["sides"][name]["cpu_seconds"] / published["cpu_seconds"]]
        rows.append([*row, case["worst"]["defaults"]] if worst else row)
    return Table(title, columns, rows)


if __name__ == "__main__":
    sys.exit(main())
