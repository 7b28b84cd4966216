"""tools/bench/compile: blocks and their weights, what a compile tells, where it ends, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.data import reference_model
from qcompiler.pipeline.memory import PeakAnonymous
from tools.bench import compile as bench
from tools.bench.compile import Enough, Recorder, block_of, weights_of


@pytest.mark.parametrize(
    "name,block",
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0"), ("encoder.block.11.layer.0.proj", "encoder.block.11"),
        ("lm_head", None), ("h.3", "h.3"), ("model.conv1d.proj", None),
    ],
)  # fmt: skip
def test_a_block_is_the_path_up_to_its_first_number(name: str, block: str | None) -> None:
    assert block_of(name) == block


def test_weights_of_the_reference_model() -> None:
    found = weights_of(reference_model())
    blocks = [f"model.layers.{i}" for i in range(6)]
    assert found.keys() == {None, *blocks} and len({found[block] for block in blocks}) == 1
    config = json.loads((reference_model() / "config.json").read_text())
    assert found[None] == config["vocab_size"] * config["hidden_size"]


def told(recorder: Recorder, blocks: int) -> None:
    """A compile of `blocks` blocks with two matrices each, and a head."""
    recorder.stage("gptq")
    names = [f"model.layers.{block}.{name}" for block in range(blocks) for name in ("q", "k")] + ["lm_head"]
    for i, name in enumerate(names, 1):
        recorder.solved(i, len(names), name, "solved")
    recorder.stage("write")


def test_matrices_belong_to_their_block_and_stage() -> None:
    with PeakAnonymous() as memory:
        recorder = Recorder(memory, None)
        told(recorder, 3)
        recorder.close()
    assert recorder.blocks == [f"model.layers.{i}" for i in range(3)]
    assert [one["stage"] for one in recorder.stages] == ["gptq", "write"]
    gptq = recorder.stages[0]
    assert 0 < math.fsum(one["seconds"] for one in recorder.solved_ones) <= gptq["seconds"] * (1 + 1e-9)
    assert all(0 < one["peak_bytes"] <= gptq["peak_bytes"] for one in recorder.solved_ones)


def test_it_ends_where_the_next_block_has_a_matrix_and_not_before() -> None:
    with PeakAnonymous() as memory:
        recorder = Recorder(memory, 2)
        with pytest.raises(Enough):
            told(recorder, 3)
        assert [one["name"] for one in recorder.solved_ones] == [f"model.layers.{i}.{n}" for i in (0, 1) for n in "qk"]
        told(Recorder(memory, 3), 3)  # all of them: what lies outside of blocks does not count


def test_a_run_that_ended_early_says_so_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def compiled(checkpoint: Path, **given: object) -> None:
        asked.update(given)
        told(given["reporter"], 6)

    monkeypatch.setattr(qcompiler, "compile", compiled)
    monkeypatch.setattr(bench, "LIMIT_SIZE", 32)
    threads = torch.get_num_threads()
    file = tmp_path / "compile.json"
    arguments = ["--model", str(reference_model()), "--blocks", "2", "--memory", "1GiB", "--samples", "2", "--json", str(file)]
    try:
        assert bench.main([*arguments, "--threads", "1", "--work", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (asked["recipe"], asked["memory"], asked["samples"], asked["length"]) == ("int4-gptq", 2**30, 2, 256)
    said = capsys.readouterr().out
    assert "ENDED behind 2 of 6 blocks" in said and "times the floor" in said
    results = json.loads(file.read_text())
    assert (results["report"], results["whole"], len(results["blocks"])) == ("bench-compile", False, 2)
    pace = 2 * 2 * 256 / (sum(results["matmul_flops"]) / 2)
    assert results["blocks"][0]["floor_seconds"] == pytest.approx(results["blocks"][0]["weights"] * pace)
    assert not list(tmp_path.glob("bench-compile-*"))  # nothing is left


def test_what_is_no_number_of_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--shape", "0.1b", "--blocks", "0", "--work", str(tmp_path)]) == 2
    assert "--blocks is 0, expected a number from 1 up" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
