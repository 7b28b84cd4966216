"""Reading an artifact: what is refused, and in which words; nothing outside the directory is ever reached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompiler.artifact.manifest import seal
from qcompiler.errors import GateError, InputError, QCompilerError, UnsupportedError
from qcompiler.runtime.artifact import is_plain_name, open_artifact, verify_files


def small_artifact(folder: Path) -> Path:
    """An artifact of one input and one cache layer; its graph is no graph, which reading does not look at."""
    import hashlib

    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "trace").mkdir()
    (folder / "trace" / "passes.jsonl").write_text("{}\n")
    names = ("model.onnx", "trace/passes.jsonl")
    contents = {name: (folder / name).read_bytes() for name in names}
    layer = {"past_key": "k", "past_value": "v", "present_key": "K", "present_value": "V", "heads": 2, "head_dim": 64,
             "dtype": "float32"}  # fmt: skip
    cache = [{"name": name, "dtype": "float32", "shape": [1, 2, "capacity", 64]} for name in ("k", "v")]
    manifest = {
        "format": "qcompiler-artifact", "schema": 1, "qcompiler": "0.1.0", "layout_version": 1, "target": "onnx",
        "kind": "decoder", "entry": "model.onnx", "context": 1024, "tokens": {"bos": 0, "eos": [0, 5], "pad": None},
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, "length"]},
                   {"name": "n", "dtype": "int64", "shape": [1]}, *cache],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, "length", 4096], "role": "logits"}],
        "cache": {"kind": "shared", "past_length": "n", "layers": [layer]},
        "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                  for name, data in contents.items()},
    }  # fmt: skip
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_artifact(tmp_path / "artifact")


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest and seal it again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_bytes(seal(manifest))


def test_an_artifact_says_what_it_is(folder: Path) -> None:
    artifact = open_artifact(folder)
    assert (artifact.target, artifact.kind, artifact.context, artifact.eos) == ("onnx", "decoder", 1024, (0, 5))
    assert [info.role for info in artifact.inputs] == ["tokens", "past_length", "past_key", "past_value"]
    assert artifact.cache is not None and artifact.cache.layers[0].head_dim == 64
    assert artifact.input("tokens") is artifact.inputs[0] and artifact.input("mask") is None
    assert artifact.file("trace/passes.jsonl").is_file()
    assert verify_files(artifact) == 2


def test_what_is_not_an_artifact(tmp_path: Path, folder: Path) -> None:
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (folder / "model.onnx", "is a file"),
        (tmp_path, "has no manifest.json"),
    ):
        with pytest.raises(InputError, match=message):
            open_artifact(path)
    for text in ("", "{", "[]", "\udcff", '{"format": "other"}', "[" * 100_000, "5"):
        (folder / "manifest.json").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match="manifest.json"):
            open_artifact(folder)


def test_a_newer_schema_names_the_version_to_install(folder: Path) -> None:
    change(folder, lambda m: m.update(schema=2, qcompiler="3.4"))
    with pytest.raises(UnsupportedError, match="has schema 2, this qcompiler reads up to 1.*qcompiler 3.4"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema=0), "schema is 0"),
        (lambda m: m.update(schema=True), "schema is True"),
        (lambda m: m.update(target="tflite"), "target is 'tflite', expected one of onnx, onnx-stock, torch"),
        (lambda m: m.update(kind=None), "kind is None"),
        (lambda m: m.update(entry="other.onnx"), "entry is 'other.onnx', expected a name listed under `files`"),
        (lambda m: m.update(inputs={}), "inputs is {}, expected a list"),
        (lambda m: m["inputs"][0].pop("name"), r"inputs\[0\].name is None, expected a text"),
        (lambda m: m["inputs"][0].update(shape=[1.5]), r"inputs\[0\].shape"),
        (lambda m: m["cache"].update(kind="magic"), "cache.kind is 'magic'"),
        (lambda m: m["cache"].pop("past_length"), "cache.past_length is None"),
        (lambda m: m["cache"]["layers"][0].update(heads=-1), r"cache.layers\[0\].heads is -1"),
        (lambda m: m["tokens"].update(eos=["x"]), "tokens.eos is 'x'"),
        (lambda m: m.update(context="long"), "context is 'long'"),
        (lambda m: m["files"].update({"model.onnx": 5}), "files"),
        (lambda m: m["files"]["model.onnx"].pop("sha256"), "sha256 is None"),
        (lambda m: m.update(files=[]), "files is"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, edit: Callable, message: str) -> None:
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        open_artifact(folder)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside", "trace/../../outside", "./model.onnx", "a//b", "", "C:\\x", "a\\b", "x\0y", "."],
)
def test_a_name_that_leads_outside_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"graph")
    assert not is_plain_name(name)
    change(folder, lambda m: m["files"].update({name: m["files"]["model.onnx"]}))
    with pytest.raises(InputError, match="expected a plain relative path inside the artifact"):
        open_artifact(folder)
    change(folder, lambda m: (m["files"].pop(name), m.update(entry=name)))
    with pytest.raises(InputError, match="entry"):
        open_artifact(folder)


def test_a_link_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(b"graph")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(GateError, match="model.onnx goes through a symbolic link"):
        open_artifact(folder)


def test_a_folder_that_is_a_link_is_refused(folder: Path) -> None:
    shutil.move(folder / "trace", folder.parent / "trace")
    (folder / "trace").symlink_to(folder.parent / "trace")
    with pytest.raises(GateError, match="trace/passes.jsonl goes through a symbolic link"):
        open_artifact(folder)


def test_missing_and_cut_files_are_named(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"gra")
    (folder / "trace" / "passes.jsonl").unlink()
    with pytest.raises(GateError, match="model.onnx has 3 bytes, the manifest says 5; trace/passes.jsonl is missing"):
        open_artifact(folder)


def test_verify_names_everything_that_is_not_as_written(folder: Path) -> None:
    artifact = open_artifact(folder)
    (folder / "model.onnx").write_bytes(b"GRAPH")
    (folder / "trace" / "passes.jsonl").unlink()
    (folder / "trace" / "more").write_text("")
    (folder / "elsewhere").symlink_to(folder.parent)
    with pytest.raises(GateError) as caught:
        verify_files(artifact)
    for part in (
        "4 of its files", "model.onnx is damaged", "passes.jsonl is missing", "trace/more is not in the manifest",
        "elsewhere is not in the manifest",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_verify_finds_a_changed_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"context": 1024', '"context": 2048'))
    with pytest.raises(GateError, match="manifest.json was changed"):
        verify_files(open_artifact(folder))


def test_a_file_that_is_not_listed_is_not_given(folder: Path) -> None:
    with pytest.raises(InputError, match="lists no file '../outside'"):
        open_artifact(folder).file("../outside")


def test_every_byte_of_the_manifest_matters_or_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(QCompilerError):
            verify_files(open_artifact(folder))
