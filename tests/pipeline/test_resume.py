"""A compile that was killed and resumed gives the bytes of one that was not."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qcompiler
from qcompiler.errors import Stopped
from qcompiler.sweep.store import SolvedStore
from tests.checkpoints import tiny_decoder

RECIPE = {
    "name": "calibrated",
    "linear": {"bits": 4, "group": 32, "activations": "int8-block128"},
    "calibration": {"samples": 6, "length": 32},
    "passes": [{"round_to_nearest": {"kind": "embedding"}}, "gptq", "round_to_nearest"],
}


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an uninterrupted compile."""
    return _digests(_compile(checkpoint, tmp_path_factory.mktemp("whole") / "model"))


def _compile(checkpoint: Path, output: Path, **more: Any) -> Path:
    return qcompiler.compile(checkpoint, output=output, recipe=RECIPE, reproducible=True, **more).path


def _kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM as soon as so many layers are stored."""
    put, done = SolvedStore.put, [0]

    def dying(self: SolvedStore, *arguments: Any) -> Any:
        result = put(self, *arguments)
        done[0] += 1
        if done[0] == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(SolvedStore, "put", dying)


def test_two_compiles_give_equal_bytes_of_every_file(checkpoint: Path, whole: dict[str, str], tmp_path: Path):
    assert _digests(_compile(checkpoint, tmp_path / "again")) == whole
    assert {"manifest.json", "model.onnx", "model.onnx.data", "trace/timings.jsonl"} <= set(whole)


def test_a_stopped_compile_goes_on_where_it_was(checkpoint: Path, whole: dict[str, str], tmp_path: Path):
    output = tmp_path / "model"
    for count in (2, 9):
        with pytest.MonkeyPatch.context() as patch:
            _kill_after(count, patch)
            with pytest.raises(Stopped, match="with --resume goes on from there"):
                _compile(checkpoint, output, resume=True)
        assert not output.exists()
        assert len(list((tmp_path / ".model.work" / "solved").iterdir())) == (2 if count == 2 else 11)
    assert _digests(_compile(checkpoint, output, resume=True)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_without_resume_it_begins_anew(checkpoint: Path, whole: dict[str, str], tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        _kill_after(3, patch)
        with pytest.raises(Stopped):
            _compile(checkpoint, tmp_path / "model")
    (tmp_path / ".model.work" / "solved" / f"{'0' * 64}.safetensors").write_bytes(b"of another run")
    assert _digests(_compile(checkpoint, tmp_path / "model")) == whole
    assert not (tmp_path / ".model.work").exists()


def test_an_error_leaves_nothing_behind(checkpoint: Path, tmp_path: Path):
    wrong = RECIPE | {"passes": ["gptq", {"round_to_nearest": {"select": {"role": "nothing"}}}]}
    with pytest.raises(qcompiler.errors.UsageError, match="names no layer"):
        qcompiler.compile(checkpoint, output=tmp_path / "model", recipe=wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_random_kills(checkpoint: Path, whole: dict[str, str], tmp_path: Path):
    """SIGKILL at a random moment, twenty times, resumed after each."""
    program = (
        "import sys, qcompiler; from tests.pipeline.test_resume import RECIPE; "
        "qcompiler.compile(sys.argv[1], output=sys.argv[2], recipe=RECIPE, reproducible=True, resume=True)"
    )
    chance, output, kills = random.Random(0), tmp_path / "model", 0
    longest = 12.0
    while True:
        run = subprocess.Popen([sys.executable, "-c", program, str(checkpoint), str(output)], cwd=Path(__file__).parents[2])
        try:
            run.wait(chance.uniform(0.2, longest) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            assert not output.exists() or _digests(output) == whole
            continue
        assert run.returncode == 0
        assert _digests(output) == whole
        if kills >= 20:
            return
        for path in sorted(output.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        output.rmdir()
        longest *= 0.8  # a machine that finishes sooner is killed sooner
