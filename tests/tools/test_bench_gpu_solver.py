"""tools/bench/gpu-solver: layers and their sizes, sums, a small run on the CPU, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.runtime.fake_gpu import fake_gpus
from tools.bench import command, gpu_solver
from tools.bench.gpu_solver import LAYERS, Layer


def test_the_layers_are_those_of_a_block_of_a_70b_model() -> None:
    assert sum(layer.count * layer.n * layer.k for layer in LAYERS) * 80 == 68_451_041_280
    assert sum(layer.count for layer in LAYERS) == 7


def test_shrunk_layers_keep_whole_codebooks() -> None:
    assert Layer("x", 28672, 8192, 2).shrunk(32) == Layer("x", 768, 256, 2)
    assert LAYERS[0].shrunk(1) == LAYERS[0]
    assert Layer("x", 1024, 8192).shrunk(1000) == Layer("x", 256, 256)


def test_moments_are_symmetric_positive_and_the_same_again() -> None:
    layer = Layer("x", 256, 256)
    weight, hessian = gpu_solver.random_layer(layer, torch.device("cpu"), 3)
    assert weight.shape == hessian.shape == (256, 256)
    assert torch.linalg.eigvalsh(hessian.double()).min() > 0
    torch.testing.assert_close(hessian, hessian.T)
    again = gpu_solver.random_layer(layer, torch.device("cpu"), 3)
    assert torch.equal(weight, again[0]) and torch.equal(hessian, again[1])


def measured(layer: str, count: int, seconds: float) -> dict:
    return {"layer": layer, "count": count, "solver": "s", "seconds": seconds}


def test_sums_count_a_layer_as_often_as_a_block_has_it() -> None:
    every = [measured(layer.name, layer.count, 1.5) for layer in LAYERS]
    (found,) = gpu_solver.sums(every)
    assert found == {"solver": "s", "block_seconds": 10.5, "model_seconds": 840.0, "whole": True}
    assert gpu_solver.sums(every[1:])[0]["whole"] is False


def test_a_small_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--shrink", "1000", "--layers", "v", "--json", str(path)]
    assert gpu_solver.main(arguments) == 0
    found = json.loads(path.read_text())
    assert [one["solver"] for one in found["measured"]] == list(gpu_solver.solvers())
    assert all(one["seconds"] > 0 and (one["n"], one["k"]) == (256, 256) for one in found["measured"])
    text = capsys.readouterr().out
    assert "SHRUNK by 1000" in text and "SOME of a block" in text


def test_a_budget_ends_a_run_and_says_what_is_missing(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    now, path = [0.0], tmp_path / "found.json"

    def timed(solve, device, repeats) -> dict:
        now[0] += 10
        return {"seconds": 10.0, "samples": [10.0], "peak_bytes": None, "fallback": False}

    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_solver, "timed", timed)
    arguments = ["--device", "cpu", "--shrink", "1000", "--layers", "v,down", "--solvers", "2D", "--budget", "25"]
    assert gpu_solver.main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(one["layer"], one["solver"]) for one in found["measured"]] == [
        ("k, v", "gptvq 2D 2.25"), ("k, v", "gptvq 2D 3.125"), ("down", "gptvq 2D 2.25"),
    ]  # fmt: skip
    assert found["unmeasured"] == ["down: gptvq 2D 3.125"]
    assert "NOT MEASURED, the run ended before: down: gptvq 2D 3.125" in " ".join(capsys.readouterr().out.split())


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=0)
    assert gpu_solver.main([]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "--device cpu --shrink 32" in captured.err


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--solvers", "awq"], "expected some of gptq int4-g128"),
        (["--layers", "lm_head"], "unknown layer 'lm_head'; known: q, o, k, v, gate, up, down"),
        (["--shrink", "0"], "--shrink is 0"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_what_is_not_understood_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert gpu_solver.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_layer_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    drawn = gpu_solver.random_layer

    def full(layer, *given):
        if layer.name == "small":
            return drawn(layer, *given)
        raise torch.OutOfMemoryError("Tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(gpu_solver, "random_layer", full)
    assert gpu_solver.main(["--device", "cpu", "--shrink", "64"]) == 6
    assert "q, o (256 x 256) does not fit on cpu: Tried to allocate 3 GiB" in capsys.readouterr().err


def test_on_a_gpu_the_time_ends_with_its_work_and_memory_is_what_a_solve_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronize"))
    monkeypatch.setattr(gpu_solver.time, "perf_counter", lambda: float(len(done)))
    solve = lambda: done.append("solve") or SimpleNamespace(fallback=None)  # noqa: E731
    found = gpu_solver.timed(solve, torch.device("cuda", 0), 2)
    assert done == ["reset", *["solve", "synchronize"] * 2]
    assert found == {"seconds": 2.0, "samples": [2.0, 2.0], "peak_bytes": 4000, "fallback": None}
