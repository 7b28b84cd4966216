"""Layer error and seconds of the GPTVQ solver beside the published algorithm, on the same weights and Hessians.

    ./tools/bench/gptvq --threads 1 --repeats 3 --json gptvq.json
    ./tools/bench/gptvq --no-reference --random 4096x14336 --bits vq3 --sides checked --threads 1 --repeats 1

Layers: every projection of the bundled reference model, with second moments of what the calibration text feeds it, and
random layers on request. Shapes are those of the paper: 2 columns a vector, 8-bit codebooks, no scales; 2.125 bits: 16 entries
for 8 x 256 weights, 3.125: 64 for 32 x 256; or those of a format (`vq3`, or a label), which `official` cannot solve: name the
sides then. The error is tr(D H Dᵀ); `held-out` the same error under second moments of other text, which no solver saw; `peak`
the most anonymous memory that a side took beyond what was held before it.

`official` is the solver's mode that behaves as the authors' program does, with the same EM, 100 iterations of it: losses and
times are compared with it. `published` is that program written from its description, far slower: its loss tells whether
`official` is what it says. A round solves a layer with each side in random order.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qcompiler.numerics.gptvq import GptvqOptions, gptvq
from qcompiler.numerics.hessian import layer_loss
from qcompiler.numerics.vq_shape import VqShape
from qcompiler.ops.formats import VqFormat
from qcompiler.pipeline.memory import PeakAnonymous
from qcompiler.recipe.schema import VQ_FORMATS
from qcompiler.report import tables
from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.tables import Column, Document, Table, Text
from tools.bench.gptq import Layer, random_layer, reference_layers
from tools.bench.gptvq_published import published_gptvq

SHAPES = {
    "2.125": VqShape(2, 16, 8, 256, scales="none", spread=False),
    "3.125": VqShape(2, 64, 32, 256, scales="none", spread=False),
}
OFFICIAL, OURS, CHECKED, PUBLISHED = "official", "ours", "checked", "published"
# `checked` adds the comparison with rounding, which the published algorithm does not make: what a compile runs.
OPTIONS = {
    OFFICIAL: GptvqOptions(mode="official", iterations=100),
    OURS: GptvqOptions(compare=False),
    CHECKED: GptvqOptions(),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default=",".join(SHAPES), metavar="N,…", help=f"{', '.join(SHAPES)}, or formats [all numbers]")
    parser.add_argument("--sides", metavar="NAME,…", help=f"of {', '.join(OPTIONS)}; the first is the base [all]")
    parser.add_argument("--random", default="none", metavar="NxK,…", help="sizes of random layers [none]")
    parser.add_argument("--no-reference", action="store_true", help="without the layers of the reference model")
    parser.add_argument("--published", action="store_true", help="with the published algorithm, once a layer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="[all]")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds [3]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random layers and the order [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    order = random.Random(chosen.seed)
    sides = chosen.sides.split(",") if chosen.sides else list(OPTIONS)
    if unknown := sorted(set(sides) - set(OPTIONS)):
        raise SystemExit(f"unknown side {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    cases = []
    for layer in layers(chosen):
        for bits in chosen.bits.split(","):
            print(f"{layer.name}, {bits} bits", file=sys.stderr, flush=True)
            cases.append(measure(layer, bits, chosen.repeats, order, sides, chosen.published))
    document = report(cases, chosen)
    if chosen.json:
        chosen.json.write_text(document.to_json() + "\n")
    tables.show(document)
    return 0


def layers(chosen: argparse.Namespace) -> list[Layer]:
    found = [] if chosen.no_reference else list(reference_layers())
    if chosen.random != "none":
        found += [random_layer(*map(int, size.split("x")), chosen.seed) for size in chosen.random.split(",")]
    return found


# ---- measuring


def shape_of(bits: str) -> VqShape:
    """A shape of the paper, or that of a format by its name or label."""
    return SHAPES[bits] if bits in SHAPES else VqShape.of(VqFormat.parse(VQ_FORMATS.get(bits, bits)))


def measure(
    layer: Layer, bits: str, repeats: int, order: random.Random, chosen: list[str], published: bool = False
) -> dict[str, Any]:
    """Losses and seconds of one layer, the chosen sides."""
    shape = shape_of(bits)
    fallbacks: list[str] = []

    def solver(chosen: GptvqOptions) -> Callable[[], torch.Tensor]:
        def solve() -> torch.Tensor:
            result = gptvq(layer.weight, layer.hessian, shape, chosen)
            if result.fallback:
                fallbacks.append(result.fallback)
            return result.weight.dequantize()

        return solve

    solvers = {name: solver(OPTIONS[name]) for name in chosen}
    if published:
        solvers[PUBLISHED] = lambda: published_gptvq(layer.weight, layer.hessian, shape.dim, shape.centroids, shape.rows)
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in solvers}
    losses: dict[str, dict[str, float]] = {}
    peaks = dict.fromkeys(solvers, 0)
    for index in range(repeats + 1):
        for name in order.sample(list(solvers), len(solvers)):
            if index and name == PUBLISHED:
                continue
            with PeakAnonymous() as memory:
                start, cpu = time.perf_counter(), time.process_time()
                solved = solvers[name]()
                taken, cpu = time.perf_counter() - start, time.process_time() - cpu
            peaks[name] = max(peaks[name], memory.growth)
            if index or name == PUBLISHED:
                seconds[name].append(taken)
                cpu_seconds[name].append(cpu)
            if not index:  # the first round warms up, and tells the losses: they are the same in every round
                losses[name] = {
                    "loss": layer_loss(layer.weight, solved, layer.hessian.double()),
                    "held_out": layer_loss(layer.weight, solved, layer.held_out.double()),
                }
    sides = {
        name: {
            **losses[name], "seconds": median(seconds[name]), "cpu_seconds": median(cpu_seconds[name]), "samples": seconds[name],
            "peak_bytes": peaks[name],
        } for name in solvers
    }  # fmt: skip
    return {
        "layer": layer.name, "rows": layer.weight.shape[0], "columns": layer.weight.shape[1], "bits": bits, "sides": sides,
        "fallbacks": fallbacks,
    }  # fmt: skip


# ---- telling


def report(cases: list[dict[str, Any]], chosen: argparse.Namespace) -> Document:
    machine = {"cpu": cpu_model(), "processors": os.cpu_count(), "load": os.getloadavg()[0], **environment()}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    data = {
        "command": sys.argv[1:], "commit": git.stdout.strip(), "machine": machine, "threads": chosen.threads,
        "rounds": chosen.repeats, "shapes": {bits: repr(shape_of(bits)) for bits in chosen.bits.split(",")},
        "options": {name: repr(value) for name, value in OPTIONS.items()}, "cases": cases, "means": means(cases),
    }  # fmt: skip
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors (load {machine['load']:.1f}), {chosen.threads} threads, torch "
        f"{machine['versions'].get('torch')}, commit {data['commit'][:10]}",
        f"medians of {chosen.repeats} interleaved rounds; columns of all sides but the first are ratios to it: below 1 means a "
        "lower loss, or less time",
        "cpu: time of all threads together, which other programs on the machine disturb less",
    ]
    return Document("bench-gptvq", data, [Text("", lines), _layers(cases), _means(data["means"])])


def base_of(cases: list[dict[str, Any]]) -> str:
    """The side that the others are compared with."""
    return next(iter(cases[0]["sides"]))


def means(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of bits: geometric means and the worst layer of the losses' ratios, ratios of the times' sums."""
    made, base = [], base_of(cases)
    for bits in dict.fromkeys(case["bits"] for case in cases):
        same = [case["sides"] for case in cases if case["bits"] == bits]
        sides: dict[str, dict[str, float]] = {}
        for name in same[0]:
            ratios = {key: [side[name][key] / side[base][key] for side in same] for key in ("loss", "held_out")}
            sums = {key: sum(side[name][key] for side in same) for key in ("seconds", "cpu_seconds")}
            sides[name] = {
                **{key: math.exp(sum(map(math.log, values)) / len(values)) for key, values in ratios.items()},
                **{key: value / sum(side[base][key] for side in same) for key, value in sums.items()},
                "worst": max(ratios["loss"]),
            }  # fmt: skip
        made.append({"layers": len(same), "bits": bits, "sides": sides})
    return made


ratio = lambda value: f"{value:.3f}"  # noqa: E731


def _layers(cases: list[dict[str, Any]]) -> Table:
    base = base_of(cases)
    others = [name for name in cases[0]["sides"] if name != base]
    columns = [Column("layer"), Column("bits", right=True), Column(f"{base} loss", lambda v: f"{v:.4g}", right=True)]
    columns += [Column("seconds", ratio, right=True), Column("peak, MiB", lambda v: f"{v / 2**20:.0f}", right=True)]
    for name in others:
        columns += [Column(f"{name}: {what}", ratio, right=True) for what in ("loss", "held-out", "cpu")]
    rows = []
    for case in cases:
        first = case["sides"][base]
        row = [case["layer"], case["bits"], first["loss"], first["seconds"], first["peak_bytes"]]
        for name in others:
            row += [case["sides"][name][key] / first[key] for key in ("loss", "held_out", "cpu_seconds")]
        rows.append(row)
    return Table("layers", columns, rows)


def _means(found: list[dict[str, Any]]) -> Table:
    columns = [Column("bits"), Column("layers", right=True), Column("side")]
    columns += [Column(what, ratio, right=True) for what in ("loss", "worst layer", "held-out", "time", "cpu")]
    rows = [
        [mean["bits"], mean["layers"], name, *(side[key] for key in ("loss", "worst", "held_out", "seconds", "cpu_seconds"))]
        for mean in found
        for name, side in mean["sides"].items()
        if name != next(iter(mean["sides"]))
    ]
    return Table("geometric means of losses, sums of times", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
