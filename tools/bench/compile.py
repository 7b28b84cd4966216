"""Seconds and memory of a compile: its stages, and the blocks that a calibrated recipe solves one after another.

    ./tools/bench/compile --shape 7b --recipe int4-gptq --samples 8 --memory 4GiB --blocks 2 --json compile.json
    ./tools/bench/compile --model DIR --recipe vq2

`--shape` is a random Llama (tools/random_checkpoint.py), written before and deleted behind. `--blocks N` ends the compile when N
blocks are solved; what the others would take is the last one's time again. The machine's limit is its float32 `torch.matmul`,
measured before and after: a block's `floor` is the time of that for its weights and the samples' tokens, once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

import qcompiler
from qcompiler.capture.checkpoint_files import weight_files
from qcompiler.cli.options import byte_count
from qcompiler.errors import UsageError
from qcompiler.pipeline.memory import PeakAnonymous
from qcompiler.report.doctor import cpu_model
from qcompiler.report.environment import environment
from qcompiler.report.progress import Silent
from qcompiler.report.tables import Column, Document, Table, Text
from tools import random_checkpoint
from tools.bench.command import Keep, tell
from tools.bench.command import run as run_command

LIMIT_SIZE = 2048  # of the weight in the measured limit
_BLOCK = re.compile(r"^(.*?\.\d+)\.")  # of a module's path, up to its first number


class Enough(Exception):
    """As many blocks as were asked for are solved."""


class Recorder(Silent):
    """The stages of a compile and the matrices that it solves, each with its seconds and the peak of anonymous memory.

    Args:
        memory: an open one.
        blocks: how many blocks are solved before `Enough`; None: all.
    """

    def __init__(self, memory: PeakAnonymous, blocks: int | None) -> None:
        self._memory, self._blocks = memory, blocks
        self._last = time.perf_counter()
        self.stages: list[dict[str, Any]] = []
        self.solved_ones: list[dict[str, Any]] = []

    def stage(self, name: str) -> None:
        self.close()
        self.stages.append({"stage": name, "seconds": 0.0, "peak_bytes": 0})

    def solved(self, i: int, n: int, name: str, message: str) -> None:
        block = block_of(name)
        if self._blocks is not None and block is not None and block not in self.blocks and len(self.blocks) == self._blocks:
            raise Enough
        seconds, peak = self._lap()
        self.solved_ones.append({"name": name, "block": block, "seconds": seconds, "peak_bytes": peak, "told": message})
        self._count(seconds, peak)
        tell(f"{i} of {n}  {name}  {message}")

    @property
    def blocks(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(one["block"] for one in self.solved_ones if one["block"] is not None))

    def close(self) -> None:
        """The last stage is over."""
        self._count(*self._lap())

    def _lap(self) -> tuple[float, int]:
        before, self._last = self._last, time.perf_counter()
        return self._last - before, self._memory.restart()

    def _count(self, seconds: float, peak: int) -> None:
        if self.stages:
            stage = self.stages[-1]
            stage["seconds"] += seconds
            stage["peak_bytes"] = max(stage["peak_bytes"], peak)


def block_of(name: str) -> str | None:
    """The block of a module: its path up to the first number; None outside of all."""
    found = _BLOCK.match(f"{name}.")
    return found and found[1]


def weights_of(checkpoint: Path) -> dict[str | None, int]:
    """Numbers in the matrices of every block, and under None of those outside of all."""
    found: dict[str | None, int] = {}
    for file in weight_files(checkpoint):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                shape = tensors.get_slice(name).get_shape()
                if len(shape) > 1:
                    found[block_of(name)] = found.get(block_of(name), 0) + math.prod(shape)
    return found


def multiply_rate(tokens: int, repeats: int = 5) -> float:
    """Multiplications and additions a second of `torch.matmul` in float32, of that many rows."""
    x, w = torch.randn(tokens, LIMIT_SIZE), torch.randn(LIMIT_SIZE, LIMIT_SIZE)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.matmul(x, w)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * LIMIT_SIZE**2 / median(seconds[1:])


# ---- measuring


def measure(chosen: argparse.Namespace, checkpoint: Path, output: Path) -> dict[str, Any]:
    tokens = chosen.samples * chosen.length
    rates = [multiply_rate(tokens)]
    with PeakAnonymous() as memory:
        recorder = Recorder(memory, chosen.blocks)
        start, whole = time.perf_counter(), True
        try:
            qcompiler.compile(
                checkpoint, output=output, recipe=chosen.recipe, target=chosen.target, samples=chosen.samples,
                length=chosen.length, memory=chosen.memory, reporter=recorder,
            )  # fmt: skip
        except Enough:
            whole = False
        seconds = time.perf_counter() - start
        recorder.close()
    rates.append(multiply_rate(tokens))
    weights = weights_of(checkpoint)
    blocks = [_block(name, recorder, weights.get(name), 2 * tokens / (sum(rates) / len(rates))) for name in recorder.blocks]
    return {
        "checkpoint": chosen.shape or str(chosen.model), "weights": sum(weights.values()), "recipe": chosen.recipe,
        "target": chosen.target, "samples": chosen.samples, "length": chosen.length, "memory": chosen.memory,
        "threads": torch.get_num_threads(), "cpu": cpu_model(), "environment": environment(),
        "blocks_of_model": len([name for name in weights if name is not None]), "whole": whole, "seconds": seconds,
        "matmul_flops": rates, "stages": recorder.stages, "blocks": blocks, "solved": recorder.solved_ones,
    }  # fmt: skip


def _block(name: str, recorder: Recorder, weights: int | None, pace: float) -> dict[str, Any]:
    ones = [one for one in recorder.solved_ones if one["block"] == name]
    return {
        "block": name, "matrices": len(ones), "weights": weights, "seconds": sum(one["seconds"] for one in ones),
        "floor_seconds": None if weights is None else weights * pace, "peak_bytes": max(one["peak_bytes"] for one in ones),
    }  # fmt: skip


# ---- telling


def report(results: dict[str, Any], command: list[str]) -> Document:
    gib = lambda value: f"{value / 2**30:.2f}"  # noqa: E731
    seconds = lambda value: f"{value:.1f}"  # noqa: E731
    before, after = (rate / 1e9 for rate in results["matmul_flops"])
    budget = "no bound" if results["memory"] is None else f"{gib(results['memory'])} GiB"
    lines = [
        f"{results['checkpoint']}, {results['weights'] / 1e9:.2f} billion weights, {results['recipe']} for target "
        f"{results['target']}, {results['samples']} samples of {results['length']} tokens, memory: {budget}",
        f"{results['cpu']}, {results['threads']} threads; float32 matmul {before:.0f} GFLOP/s before, {after:.0f} after",
    ]
    blocks, total = results["blocks"], results["blocks_of_model"]
    if results["whole"]:
        lines.append(f"whole: {results['seconds']:.0f} s")
    else:
        left = (total - len(blocks)) * blocks[-1]["seconds"]
        lines.append(
            f"ENDED behind {len(blocks)} of {total} blocks: {results['seconds']:.0f} s; the other blocks at the pace of the "
            f"last: {left:.0f} s more, without what follows them"
        )
    stages = [[one["stage"], one["seconds"], one["peak_bytes"]] for one in results["stages"]]
    memory = Column("peak, GiB", gib, right=True)
    tables: list[Table | Text] = [
        Text("", lines), Table("stages", (Column("stage"), Column("seconds", seconds, right=True), memory), stages),
    ]  # fmt: skip
    if blocks:
        columns = (
            Column("block"), Column("matrices", str, right=True), Column("seconds", seconds, right=True),
            Column("floor", seconds, right=True), Column("times the floor", seconds, right=True), memory,
        )  # fmt: skip
        rows = [
            [
                one["block"], one["matrices"], one["seconds"], one["floor_seconds"],
                None if not one["floor_seconds"] else one["seconds"] / one["floor_seconds"], one["peak_bytes"],
            ] for one in blocks
        ]  # fmt: skip
        tables.append(Table("blocks", columns, rows))
    return Document("bench-compile", {"command": command, **results}, tables)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=random_checkpoint.SHAPES, help="a random Llama of this size")
    source.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--recipe", default="int4-gptq", metavar="NAME|FILE", help="[int4-gptq]")
    parser.add_argument("--target", default="onnx", choices=("onnx", "onnx-stock", "torch"), help="[onnx]")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration windows [8]")
    parser.add_argument("--length", type=int, default=256, metavar="L", help="tokens in each [256]")
    parser.add_argument("--memory", type=byte_count, metavar="SIZE", help="most memory that calibration may take [no bound]")
    parser.add_argument("--blocks", type=int, metavar="N", help="end behind so many [all]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="[all]")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the checkpoint and the artifact are written [temporary]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)

    def measured(keep: Keep) -> dict[str, Any]:
        for name in ("samples", "length", "threads", "blocks"):
            value = getattr(chosen, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}, expected a number from 1 up")
        torch.set_num_threads(chosen.threads)
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-compile-", dir=chosen.work)))
            checkpoint = chosen.model
            if checkpoint is None:
                checkpoint = work / "model"
                tell(f"writing a random Llama of {chosen.shape}")
                random_checkpoint.write(checkpoint, random_checkpoint.SHAPES[chosen.shape])
            return measure(chosen, checkpoint, work / "artifact")

    return run_command("bench-compile", arguments, measured, report, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
