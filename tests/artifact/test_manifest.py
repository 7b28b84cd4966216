"""The manifest: what it holds, and that it guards itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qcompiler.artifact.manifest import build_manifest, check_seal, read_ours, seal
from qcompiler.cli.verify import verify
from qcompiler.errors import GateError, QCompilerError
from tests.report import fake


def test_golden() -> None:
    assert fake.manifest() == {
        "format": "qcompiler-artifact",
        "schema": 1,
        "qcompiler": fake.manifest()["qcompiler"],
        "layout_version": 1,
        "target": "onnx",
        "kind": "decoder",
        "model": {"source": "tiny", "type": "llama", "parameters": 131072},
        "recipe": "int4",
        "entry": "model.onnx",
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, "length"]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, "length", 64]}],
        "cache": None,
        "tokens": None,
        "context": 1024,
        "unfused": [],
        "fallbacks": [],
        "allowed": {},
    }


def test_unknown_words_are_refused() -> None:
    for changes in (
        {"target": "tensorrt"},
        {"kind": "diffusion"},
        {"extra": {"files": {}}},
        {"extra": {"target": "x"}},
    ):
        with pytest.raises(ValueError):
            fake.manifest(**changes)
    assert fake.manifest(extra={"tests": 3})["tests"] == 3
    assert build_manifest.__doc__


def test_any_changed_byte_of_the_manifest_shows(tmp_path: Path, exhaustive: bool) -> None:
    path = tmp_path / "manifest.json"
    data = seal(fake.manifest(extra={"list": [1, 2.5, "ü", None, True]}) | {"files": {"a": {"bytes": 1}}})
    path.write_bytes(data)
    check_seal(path)
    draw = random.Random(3)
    positions = range(len(data)) if exhaustive else draw.sample(range(len(data)), 200)
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(GateError):
            check_seal(path)
    for whole in (data + b"\n", data[:-1], json.dumps(json.loads(data)).encode(), b"", b"[]", b"[" * 100_000):
        path.write_bytes(whole)
        with pytest.raises(GateError):
            check_seal(path)


def test_verify_finds_one_flipped_bit_anywhere(tmp_path: Path, exhaustive: bool) -> None:
    """Also a file added, removed, renamed, or swapped with another."""
    target = fake.write(tmp_path / "out")
    names = [name for name, content in fake.snapshot(target).items() if content]
    assert verify(target)[0] == len(names) - 1
    draw = random.Random(4)
    for round_ in range(1000 if exhaustive else 60):
        path = target / names[round_ % len(names)]
        good = path.read_bytes()
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(QCompilerError) as caught:
            verify(target)
        # A manifest that is no JSON or names another format is refused as input; everything else is a failed check.
        assert caught.value.exit_code in ((3, 4, 5) if path.name == "manifest.json" else (5,))
        path.write_bytes(good)
    verify(target)
    (target / "extra").write_text("x")
    with pytest.raises(GateError, match="extra is not in the manifest"):
        verify(target)
    (target / "extra").unlink()
    (target / "recipe.yaml").rename(target / "recipe2.yaml")
    with pytest.raises(GateError, match="recipe.yaml is missing"):
        verify(target)
    (target / "recipe2.yaml").rename(target / "recipe.yaml")
    one, two = target / "trace/graphs/000-capture.txt", target / "trace/graphs/002-round_to_nearest.txt"
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(GateError):
        verify(target)


def test_ours_is_recognised_whatever_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(seal(fake.manifest() | {"schema": 99}))
    assert read_ours(tmp_path) is not None
    path.unlink()
    path.symlink_to("elsewhere")
    assert read_ours(tmp_path) is None
