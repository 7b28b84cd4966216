"""`qcompiler run` on real artifacts, in processes that cannot import what the minimal install lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.artifacts import reference_artifact, write_manifest
from tests.cli.process import COMPILE_ONLY, qcompiler

PROMPT = "The list of"


@pytest.fixture(scope="module")
def artifact() -> Path:
    return reference_artifact()


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture(scope="module")
def greedy(artifact: Path) -> str:
    result = qcompiler("run", artifact, PROMPT, "--max-tokens", 12, without=COMPILE_ONLY)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_minimal_install(greedy: str) -> None:
    assert len(greedy.strip()) > 10 and greedy.endswith("\n")


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_standard_input(artifact: Path, greedy: str, arguments: tuple[str, ...]) -> None:
    result = qcompiler("run", artifact, *arguments, "--max-tokens", 12, stdin=PROMPT + "\n", without=COMPILE_ONLY)
    assert (result.returncode, result.stdout) == (0, greedy)


def test_standard_input_that_is_no_text(artifact: Path) -> None:
    result = qcompiler("run", artifact, before="import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b'ab\\xff'))")
    assert result.returncode == 3 and "not UTF-8 text (byte 2)" in result.stderr


def test_speed_goes_to_stderr_and_quiet_silences_it(artifact: Path, greedy: str) -> None:
    loud = qcompiler("run", artifact, PROMPT, "--max-tokens", 12)
    quiet = qcompiler("run", artifact, PROMPT, "--max-tokens", 12, "--quiet")
    assert loud.stdout == quiet.stdout == greedy
    assert "tokens at" in loud.stderr and quiet.stderr == ""


def test_a_seed_draws_the_same(artifact: Path, greedy: str) -> None:
    drawn = [
        qcompiler("run", artifact, PROMPT, "--max-tokens", 12, "--temperature", 1.5, "--seed", seed).stdout
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] and len({greedy, *drawn}) == 3


def test_stop(artifact: Path, greedy: str) -> None:
    word = greedy.split()[-1]
    result = qcompiler("run", artifact, PROMPT, "--max-tokens", 12, "--stop", word)
    assert result.stdout.rstrip("\n") == greedy[: greedy.index(word)].rstrip("\n")


def test_without_max_tokens_a_page_at_most(artifact: Path) -> None:
    result = qcompiler("run", artifact, PROMPT)
    assert result.returncode == 0 and "tokens at" in result.stderr


def test_a_prompt_longer_than_the_context(artifact: Path) -> None:
    result = qcompiler("run", artifact, "word " * 5000)
    assert (result.returncode, result.stdout) == (6, "")
    assert (
        "the model's context is" in result.stderr and "too many" in result.stderr and "word word" not in result.stderr
    )


def test_an_empty_prompt(artifact: Path) -> None:
    result = qcompiler("run", artifact, "")
    assert result.returncode in (0, 3), result.stderr
    assert "Traceback" not in result.stderr


def test_no_such_artifact(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        result = qcompiler("run", path, "x", without=COMPILE_ONLY)
        assert (result.returncode, result.stdout) == (3, "")
        assert str(path) in result.stderr


def test_a_truncated_or_missing_file(copy: Path) -> None:
    data = copy / "model.onnx.data"
    with open(data, "r+b") as file:
        file.truncate(data.stat().st_size - 1)
    result = qcompiler("run", copy, "x")
    assert result.returncode == 5 and "model.onnx.data" in result.stderr
    data.unlink()
    result = qcompiler("run", copy, "x")
    assert result.returncode == 5 and "model.onnx.data is missing" in result.stderr


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_one_flipped_bit(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    result = qcompiler("run", copy, "x", without=COMPILE_ONLY)
    assert (result.returncode, result.stdout) == (5, "")
    assert f"{name} is damaged" in result.stderr


def test_figures_of_a_damaged_artifact_are_not_given(copy: Path) -> None:
    content = bytearray((copy / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(content)
    result = qcompiler("eval", copy, "--max-windows", 1, "--context", 32)
    assert (result.returncode, result.stdout) == (5, "") and "model.onnx.data is damaged" in result.stderr


def test_verify_checks_large_files_too(copy: Path) -> None:
    small = "import qcompiler.cli.run; qcompiler.cli.run.CHECKED_BYTES = 0"
    content = bytearray((copy / "tokenizer_config.json").read_bytes())
    content[10] ^= 1
    (copy / "tokenizer_config.json").write_bytes(content)
    assert qcompiler("run", copy, "x", "--max-tokens", 1, before=small).returncode == 0
    assert qcompiler("run", copy, "x", "--max-tokens", 1, "--verify", before=small).returncode == 5


def test_a_graph_that_is_none(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"not a graph")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    write_manifest(copy, {key: value for key, value in manifest.items() if key not in ("files", "manifest_sha256")})
    result = qcompiler("run", copy, "x")
    assert result.returncode == 3 and "cannot be loaded by ONNX Runtime" in result.stderr


def test_an_old_onnxruntime(artifact: Path) -> None:
    result = qcompiler("run", artifact, "x", before="import onnxruntime; onnxruntime.__version__ = '1.20.1'")
    assert result.returncode == 4 and "onnxruntime is 1.20.1, expected 1.21 or newer" in result.stderr


def test_no_prompt_on_a_terminal(artifact: Path) -> None:
    result = qcompiler("run", artifact, before="import sys; sys.stdin.isatty = lambda: True")
    assert result.returncode == 2 and "no prompt" in result.stderr


def test_a_plain_module_takes_no_text(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    changes = {key: manifest[key] for key in ("inputs", "outputs")}
    write_manifest(copy, changes | {"kind": "module", "cache": None})
    result = qcompiler("run", copy, "x")
    assert result.returncode == 2 and "takes arrays, not text" in result.stderr


def test_chat(copy: Path) -> None:
    """The template of the checkpoint is applied, and nothing is added to what it spells."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} of{% endif %}"
    (copy / "chat_template.jinja").write_text(template)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    write_manifest(copy, {key: value for key, value in manifest.items() if key not in ("files", "manifest_sha256")})
    chat = qcompiler("run", copy, "The list", "--chat", "--max-tokens", 8)
    plain = qcompiler("run", copy, "The list of", "--max-tokens", 8)
    assert chat.returncode == 0 and chat.stdout == plain.stdout, chat.stderr


def test_chat_without_a_template(artifact: Path) -> None:
    result = qcompiler("run", artifact, "x", "--chat")
    assert result.returncode == 3 and "has no chat template" in result.stderr


def test_bench(artifact: Path) -> None:
    few = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2)
    result = qcompiler("bench", artifact, *few, "--json", without=COMPILE_ONLY)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["schema"], data["report"], data["kernels"]) == (1, "bench", "onnxruntime")
    assert data["prompt_tokens"] == 8 and len(data["decode_tokens_per_second"]["samples"]) == 2
    result = qcompiler("bench", artifact, *few)
    assert "decode, 4 tokens" in result.stdout and "tokens/s" in result.stdout
    assert qcompiler("bench", artifact, "--new-tokens", 10**9).returncode == 2
