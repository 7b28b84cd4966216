"""Whatever is wrong with an input, in a process of its own: the exit code of its kind, one message, no trace left.

More kinds of damage, in this process and so quicker: test_bad_input.py, test_commands.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.artifacts import REFERENCE, reference_artifact, write_manifest
from tests.cli.process import qcompiler

PREFIX = "qcompiler: error: "


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every name below, with size and time of its last change."""
    stats = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def refused(folder: Path, code: int, words: tuple[str, ...], *arguments: object, before: str = "") -> None:
    """The call ends with that code, says these words in one message, and changes nothing in `folder`."""
    was = everything(folder)
    result = qcompiler(*arguments, "--quiet", cwd=folder, before=before)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("qcompiler: ")]
    assert len(message) == 1 and message[0].startswith(PREFIX), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert everything(folder) == was


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE, tmp_path / "model"))


def no_such_directory(folder: Path) -> tuple:
    return 3, ("./gone", "no such directory"), "./gone"


def truncated_weights(folder: Path) -> tuple:
    with open(folder / "model" / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return 3, ("model.safetensors", "damaged or truncated"), "model"


def a_weight_that_is_no_number(folder: Path) -> tuple:
    path, name = folder / "model" / "model.safetensors", "model.layers.2.self_attn.k_proj.weight"
    weights = load_file(path)
    weights[name][1, 2] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return 3, (name, "NaN"), "model"


def unknown_key_in_a_recipe(folder: Path) -> tuple:
    (folder / "mine.yaml").write_text("name: mine\nlinear: {bitz: 4}\n")
    return 2, ("mine.yaml: linear.bitz", "bits"), "model", "--recipe", "mine.yaml"


def a_selection_that_names_nothing(folder: Path) -> tuple:
    """Of a pass that folds: the solvers are not the only ones that select."""
    passes = "[{awq: {select: {name: '*.down_prj'}}}, round_to_nearest]"
    (folder / "mine.yaml").write_text(f"name: mine\nlinear: {{bits: 4, group: 32}}\npasses: {passes}\n")
    return 2, ("awq: its selection (name: *.down_prj) names no layer", "down_proj"), "model", "--recipe", "mine.yaml"


def windows_longer_than_the_model_takes(folder: Path) -> tuple:
    words = ("windows of 100000 tokens", "the model takes at most")
    return 2, words, "model", "--recipe", "int4-gptq", "--length", 100_000


def output_inside_input(folder: Path) -> tuple:
    return 3, ("inside the model",), "model", "-o", "model/out"


def input_inside_output(folder: Path) -> tuple:
    return 3, ("inside the output",), "model", "-o", "."


def output_that_is_no_artifact(folder: Path) -> tuple:
    (folder / "photos").mkdir()
    return 3, ("not a qcompiler artifact",), "model", "-o", "photos"


CASES = [
    no_such_directory,
    truncated_weights,
    a_weight_that_is_no_number,
    unknown_key_in_a_recipe,
    a_selection_that_names_nothing,
    windows_longer_than_the_model_takes,
    output_inside_input,
    input_inside_output,
    output_that_is_no_artifact,
]


@pytest.mark.parametrize("case", CASES)
def test_compile(case, checkpoint: Path, tmp_path: Path) -> None:
    code, words, *arguments = case(tmp_path)
    output = () if "-o" in arguments else ("-o", "out")
    refused(tmp_path, code, words, "compile", *arguments, *output)


def test_a_full_disk_at_the_first_file(tmp_path: Path) -> None:
    """No process may write a byte: the lock beside the target is the first that fails."""
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    words = ("file size limit reached", str(tmp_path / "out"))
    refused(tmp_path, 6, words, "compile", "reference", "-o", "out", "--samples", 1, "--length", 8, before=before)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference_artifact(), tmp_path / "artifact"))


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("command", [("run", "x", "--max-tokens", 1), ("verify",)])
def test_one_flipped_bit(artifact: Path, tmp_path: Path, command: tuple, name: str) -> None:
    position = None
    if name == "manifest.json":  # within a text, so that it stays JSON that says something else
        position = (artifact / name).read_bytes().index(b'"sha256": "') + len(b'"sha256": "')
    flip(artifact / name, position)
    word = "its own SHA-256" if name == "manifest.json" else f"{name} is damaged"
    refused(tmp_path, 5, (word,), command[0], "artifact", *command[1:])


@pytest.mark.parametrize("command", [("run", "x"), ("verify",)])
def test_a_missing_file(artifact: Path, tmp_path: Path, command: tuple) -> None:
    (artifact / "model.onnx.data").unlink()
    refused(tmp_path, 5, ("model.onnx.data is missing",), command[0], "artifact", *command[1:])


def test_a_prompt_longer_than_the_context(artifact: Path, tmp_path: Path) -> None:
    refused(tmp_path, 6, ("the model's context is", "too many"), "run", "artifact", "word " * 5000)


def test_an_old_onnxruntime(artifact: Path, tmp_path: Path) -> None:
    before = "import onnxruntime; onnxruntime.__version__ = '1.20.1'"
    words = ("onnxruntime is 1.20.1", "pip install 'onnxruntime>=1.21'")
    refused(tmp_path, 4, words, "run", "artifact", "x", before=before)


def test_chat_in_the_minimal_install(artifact: Path, tmp_path: Path) -> None:
    (artifact / "chat_template.jinja").write_text("{{ messages[0].content }}")
    manifest = json.loads((artifact / "manifest.json").read_bytes())
    write_manifest(artifact, {key: value for key, value in manifest.items() if key not in ("files", "manifest_sha256")})
    before = "import sys; sys.modules['jinja2'] = None"
    refused(tmp_path, 4, ("pip install 'qcompiler[chat]'",), "run", "artifact", "x", "--chat", before=before)
