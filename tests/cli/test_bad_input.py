"""Bad models and full disks through the whole of `qcompiler compile`: one clear error, its exit code, no trace left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qcompiler.cli import main
from qcompiler.runtime.artifact import open_artifact, verify_files
from tests.artifacts import REFERENCE
from tests.cli.process import qcompiler
from tests.report import fake

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE, tmp_path / "model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with its first layer only: quick to compile as a whole."""
    folder = Path(shutil.copytree(REFERENCE, tmp_path_factory.mktemp("small") / "small-model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(capsys: Capture, model: Path, code: int, *words: str) -> None:
    """`compile` ends with that code and one message with these words, and leaves nothing."""
    before = sorted(os.listdir(model.parent))
    found = main(["compile", str(model), "-o", str(model.parent / "out"), "--quiet"])
    out, err = capsys.readouterr()
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err and err.startswith("qcompiler: error: ")
    for word in words:
        assert word in err
    assert sorted(os.listdir(model.parent)) == before


def test_not_a_model(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    refused(capsys, tmp_path / "photos", 3, "photos", "config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": 3}', b'{"model_type": "no such"}', b"\xff\xfe"])
def test_a_damaged_configuration(checkpoint: Path, capsys: Capture, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    refused(capsys, checkpoint, 4 if b"model_type" in content else 3, "config.json")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_safetensors(checkpoint: Path, capsys: Capture, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(keep if keep >= 0 else size + keep)
    refused(capsys, checkpoint, 3, "model.safetensors")


def test_corrupt_safetensors_header(checkpoint: Path, capsys: Capture) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[0:8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)
    refused(capsys, checkpoint, 3, "model.safetensors")


def test_no_weights(checkpoint: Path, capsys: Capture) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(capsys, checkpoint, 3, "safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(checkpoint: Path, capsys: Capture, value: float) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, path, metadata={"format": "pt"})
    refused(capsys, checkpoint, 3, "model.layers.3.mlp.up_proj.weight")


@pytest.mark.slow
def test_full_disk(small: Path, tmp_path: Path) -> None:
    """Limits of the size of a file, from nothing to all but enough: exit 6 and nothing left; then it works."""
    for limit in (0, 1000, 100_000, 1_000_000):
        result = qcompiler(
            "compile", small, "-o", tmp_path / "out", "--samples", 1, "--length", 16,
            before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
        )  # fmt: skip
        assert result.returncode == 6, result.stderr
        assert "file size limit reached" in result.stderr and str(tmp_path / "out") in result.stderr
        assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_compile_run_and_compare(small: Path, tmp_path: Path, capsys: Capture) -> None:
    """The whole way, and equal inputs give equal bytes (but for the two files that hold times)."""
    for name in ("one", "two"):
        arguments = ["compile", small, "-o", tmp_path / name, "--samples", 1, "--length", 16, "--json"]
        assert main([str(a) for a in arguments]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["bytes"] == sum(
            path.stat().st_size
            for path in (tmp_path / name).rglob("*")
            if path.is_file() and path.name != "manifest.json"
        )
        assert verify_files(open_artifact(tmp_path / name)) > 5
    one, two = fake.snapshot(tmp_path / "one"), fake.snapshot(tmp_path / "two")
    different = {name for name in one if one[name] != two.get(name)}
    assert one.keys() == two.keys()
    assert different <= {"trace/timings.jsonl", "trace/environment.json", "manifest.json"}
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["inspect", str(tmp_path / "one")]) == 0
    assert "round_to_nearest" in capsys.readouterr().out
    assert main(["run", str(tmp_path / "one"), "The list of", "--max-tokens", "4"]) == 0
