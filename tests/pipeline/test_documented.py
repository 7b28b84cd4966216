"""What docs/artifact.md says is written is written, and nothing else: its JSON examples are the golden key sets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import qcompiler
from tests.cli.process import ROOT
from tests.pipeline.compiled import reference
from tests.pipeline.test_modules import network, rows

TEXT = (ROOT / "docs" / "artifact.md").read_text()
# Objects whose keys are names of things and not words of the format.
# `layers` is such an object in passes.jsonl; in layers.json it is a list.
BY_NAME = {"files", "layers", "config", "notes"}


def example(title: str) -> Any:
    """The first JSON block below a heading."""
    return json.loads(re.search(rf"^## {re.escape(title)}\n.*?```json\n(.*?)```", TEXT, re.S | re.M)[1])


def keys(value: Any, path: str = "") -> set[str]:
    """Paths of all keys, entries of a list as one."""
    if isinstance(value, list):
        return {key for item in value for key in keys(item, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    if path.rpartition(".")[2] in BY_NAME:
        return {path}
    return {f"{path}.{key}" for key in value} | {k for key, item in value.items() for k in keys(item, f"{path}.{key}")}


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module with one layer left in float."""
    recipe = {
        "name": "partly",
        "linear": {"bits": 4, "group": 32},
        "overrides": [{"select": {"name": "4"}, "scheme": "float"}],
        "allow": {"min_coverage": 0.5},
    }
    output = tmp_path_factory.mktemp("documented") / "out"
    return qcompiler.compile(network(), output=output, example=(rows(2),), recipe=recipe).path


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_bytes())


def test_manifest(partly: Path) -> None:
    documented = keys(example("manifest.json"))
    decoder, module = (keys(read(path, "manifest.json")) for path in (reference("int4").path, partly))
    # An artifact without unfused attention has none to describe, one without states no states.
    absent = {".unfused[].node", ".unfused[].reason"} | {f".cache.states[].{key}" for key in ("layer", "past", "present")}
    assert decoder | absent == documented
    assert module == {key for key in documented - absent if not re.match(r"\.(cache|tokens)\.|.*\.layer$", key)}
    assert read(partly, "manifest.json")["allowed"]["min_coverage"] == 0.5


def test_layers(partly: Path) -> None:
    documented = example("layers.json")
    written, left = read(reference("int4").path, "layers.json"), read(partly, "layers.json")
    assert keys(written) | {".left_in_float[].name", ".left_in_float[].bytes", ".left_in_float[].reason"} == (keys(documented))
    every = set(documented["layers"][0])
    for layer in written["layers"]:
        assert set(layer) == every - ({"output_sqnr_db"} if layer["kind"] == "embedding" else set())
    quantized, in_float = left["layers"][0], left["layers"][2]
    assert set(quantized) == every
    assert (in_float["format"], in_float["reason"]) == ("float32", "the recipe keeps it in float")
    assert set(in_float) == {
        "name", "kind", "role", "shape", "experts", "format", "bits_per_weight", "bytes", "float_bytes", "input_group",
        "tie_group", "reason",
    }  # fmt: skip
    assert left["left_in_float"] == [{"name": "4", "bytes": 4 * 33 * 5, "reason": "the recipe keeps it in float"}]


def test_passes() -> None:
    path = reference("int4").path
    documented = keys(example("trace/passes.jsonl"))
    for line in (path / "trace/passes.jsonl").read_text().splitlines():
        assert keys(json.loads(line)) | {".skipped[].node", ".skipped[].reason"} == documented
    timing = re.search(r"`trace/timings.jsonl`: `(\{.*?\})`", TEXT)
    assert timing is not None
    for line in (path / "trace/timings.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == set(json.loads(timing[1]))


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_files(target: str) -> None:
    """Every file has a row in the table, and every row that is not optional has its file."""
    table = re.findall(r"^\| (`.*?) \|", TEXT, re.M)
    names = [name for row in table for name in re.findall(r"`(.*?)`", row)] + ["model.pt2"]
    patterns = {name: re.escape(name).replace(r"NNN\-<pass>", r"\d+-\w+") for name in names}
    folder = reference("int4", target).path
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for file in files:
        assert any(re.fullmatch(pattern, file) for pattern in patterns.values()), file
    optional = {"chat_template.jinja"}
    optional |= {"model.onnx", "model.onnx.data"} if target == "torch" else {"model.pt2"}
    for name, pattern in patterns.items():
        assert name in optional or any(re.fullmatch(pattern, file) for file in files), name
