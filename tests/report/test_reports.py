"""inspect and diff: what they show, on every face; golden JSON, so that its schema changes knowingly."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import InputError, UsageError
from qcompiler.report.diff import diff_artifacts, diff_passes
from qcompiler.report.graphdiff import diff_graphs
from qcompiler.report.inspect import graph_after, inspect_artifact
from qcompiler.report.tables import Document, show
from tests.report import fake


def plain(document: Document) -> str:
    stream = io.StringIO()
    show(document, stream=stream)
    return stream.getvalue()


def as_json(document: Document) -> dict[str, Any]:
    stream = io.StringIO()
    show(document, as_json=True, stream=stream)
    return json.loads(stream.getvalue())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return fake.write(tmp_path / "out")


def test_inspect_plain(artifact: Path) -> None:
    text = plain(inspect_artifact(artifact))
    assert "\x1b" not in text and "│" not in text
    for line in (
        "recipe      int4",
        "  group: 32",
        f"{fake.Q}  attn.q  256×256  int4-g32-sym  rtn            4.50   36,864       21.4       22.0",
        "000-capture           capture        0        0        0          0  100.0  256.0 MiB",
        "002-round_to_nearest  solve          1        1        0          0   12.5  512.0 MiB",
        "001-find_sites: skipped 2× the weight is no constant (mm_1, …)",
    ):
        assert line in text, text
    assert "left out by the recipe" in text and "rope.table" in text
    assert "18.25 bits each, 50.0% quantized" in text


def test_inspect_on_a_terminal(artifact: Path) -> None:
    stream = Terminal()
    show(inspect_artifact(artifact), stream=stream)
    assert "\x1b[" in stream.getvalue() and "round_to_nearest" in stream.getvalue()


def test_a_narrow_terminal_goes_without_some_columns(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = {}
    for width in (80, 100, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        stream = Terminal()
        show(inspect_artifact(artifact), stream=stream)
        faces[width] = stream.getvalue()
        assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width for line in faces[width].splitlines()[12:])
        assert fake.Q in faces[width] and "int4-g32-sym" in faces[width] and "21.4" in faces[width]
    assert "256×256" in faces[160] and "256×256" not in faces[80]
    assert "columns do not fit" in faces[80] and "do not fit" not in faces[160]


def test_inspect_json_golden(artifact: Path) -> None:
    data = as_json(inspect_artifact(artifact))
    assert list(data) == [
        "schema", "report", "artifact", "recipe", "layers", "left_in_float", "totals", "passes",
    ]  # fmt: skip
    assert (data["schema"], data["report"]) == (1, "inspect")
    assert data["layers"][0] == fake.layer(fake.Q)
    assert data["layers"][1]["weight_sqnr_db"] == "inf"
    assert data["passes"][1] == {
        "index": 1, "name": "find_sites", "stage": "analyse", "config": {}, "required": False, "matched": 2,
        "changed": 2, "skipped": [{"node": "mm_1", "reason": "the weight is no constant"},
                                  {"node": "mm_2", "reason": "the weight is no constant"}],
        "fallbacks": [], "notes": {}, "nodes_before": 5, "nodes_after": 5, "graph": "trace/graphs/001-find_sites.txt",
        "layers": {fake.Q: {"format": "float32", "bytes": 262144}, fake.K: {"format": "float32"}},
        "milliseconds": 1.25, "peak_rss_bytes": 268435456,
    }  # fmt: skip


def test_inspect_layer(artifact: Path) -> None:
    document = inspect_artifact(artifact, "*.q_proj")
    assert [layer["name"] for layer in document.data["layers"]] == [fake.Q]
    assert document.data["history"] == {
        fake.Q: [
            {"pass": "001-find_sites", "format": "float32", "bytes": 262144},
            {"pass": "002-round_to_nearest", "format": "int4-g32-sym", "bytes": 36864, "weight_sqnr_db": 21.4},
        ]
    }
    assert "002-round_to_nearest: bytes 36864, format int4-g32-sym, weight_sqnr_db 21.4" in plain(document)
    with pytest.raises(InputError, match="no layer like '\\*.z'; layers are named like model.layers.0"):
        inspect_artifact(artifact, "*.z")


@pytest.mark.parametrize("name", ["round_to_nearest", "2", "002", "002-round_to_nearest"])
def test_inspect_pass(artifact: Path, name: str) -> None:
    assert graph_after(artifact, name) == fake.SOLVED


def test_inspect_unknown_or_repeated_pass(tmp_path: Path) -> None:
    files = fake.records()
    files["trace/passes.jsonl"].append(files["trace/passes.jsonl"][1] | {"index": 3})
    target = fake.write(tmp_path / "out", files)
    assert graph_after(target, "capture") == graph_after(target, "3") == fake.CAPTURED
    with pytest.raises(UsageError, match="ran 2 times; say which: 001-find_sites, 003-find_sites"):
        graph_after(target, "find_sites")
    with pytest.raises(UsageError, match="has no pass 'gptq'; passes: 000-capture, 001"):
        graph_after(target, "gptq")


def test_diff_of_equal_artifacts_is_empty(artifact: Path, tmp_path: Path) -> None:
    other = fake.write(tmp_path / "other")
    document = diff_artifacts(artifact, other)
    assert plain(document) == "no difference\n"
    assert as_json(document) == {
        "schema": 1, "report": "diff", "a": str(artifact), "b": str(other), "header": {}, "recipe": [], "layers": {},
        "totals": {}, "graph": {"appeared": [], "vanished": [], "changed": [], "unchanged": 5},
    }  # fmt: skip


def test_diff_of_two_artifacts(artifact: Path, tmp_path: Path) -> None:
    files = fake.records()
    files["recipe.yaml"] = b"name: int3\nlinear:\n  bits: 3\n  group: 32\n"
    layers = files["layers.json"]["layers"]
    layers[0] |= {"format": "int3-g32-sym", "bytes": 28672, "weight_sqnr_db": 15.4, "output_sqnr_db": 16.5}
    layers[1]["name"] = "lm_head"
    files["layers.json"]["totals"]["bytes"] = {"codes": 24576, "scales": 4096, "float": 266240, "total": 294912}
    other = fake.write(tmp_path / "other", files, recipe="int3")
    document = diff_artifacts(artifact, other)
    data = as_json(document)
    assert data["header"] == {"recipe": {"before": "int4", "after": "int3"}}
    assert data["recipe"] == ["- name: int4", "+ name: int3", "-   bits: 4", "+   bits: 3"]
    assert data["layers"] == {
        fake.Q: {"status": "changed", "format": {"before": "int4-g32-sym", "after": "int3-g32-sym"},
                 "bytes": {"before": 36864, "after": 28672}, "weight_sqnr_db": {"before": 21.4, "after": 15.4},
                 "output_sqnr_db": {"before": 22.0, "after": 16.5}},
        fake.K: {"status": "vanished", "format": {"before": "float32", "after": None},
                 "activation": {"before": "int8-block128", "after": None}, "bytes": {"before": 262144, "after": None},
                 "weight_sqnr_db": {"before": "inf", "after": None}},
        "lm_head": {"status": "appeared", "format": {"before": None, "after": "float32"},
                    "activation": {"before": None, "after": "int8-block128"},
                    "bytes": {"before": None, "after": 262144},
                    "weight_sqnr_db": {"before": None, "after": "inf"}},
    }  # fmt: skip
    assert data["totals"] == {"codes": {"before": 32768, "after": 24576}, "total": {"before": 303104, "after": 294912}}
    text = plain(document)
    assert "int4-g32-sym → int3-g32-sym" in text and "36,864 → 28,672 (-8,192)" in text and "21.4 → 15.4 (-6.0)" in text
    assert "scales" not in text, "what did not change is hidden"


def test_diff_of_two_passes(artifact: Path) -> None:
    data = as_json(diff_passes(artifact, "find_sites..2"))
    assert (data["from"], data["to"]) == ("001-find_sites", "002-round_to_nearest")
    assert data["passes"] == [{"pass": "002-round_to_nearest", "matched": 1, "changed": 1, "skipped": 0}]
    assert data["layers"] == {
        fake.Q: {"status": "changed", "format": {"before": "float32", "after": "int4-g32-sym"},
                 "bytes": {"before": 262144, "after": 36864}, "weight_sqnr_db": {"before": None, "after": 21.4}},
    }  # fmt: skip
    assert [node["node"] for node in data["graph"]["appeared"]] == ["w_q_codes"]
    assert [node["node"] for node in data["graph"]["vanished"]] == ["w_q"]
    assert [node["node"] for node in data["graph"]["changed"]] == ["q"]
    assert data["graph"]["unchanged"] == 3


def test_diff_ranges(artifact: Path) -> None:
    assert as_json(diff_passes(artifact, ".."))["from"] == "000-capture"
    assert as_json(diff_passes(artifact, ".."))["to"] == "002-round_to_nearest"
    assert plain(diff_passes(artifact, "1..1")) == "no difference\n"
    for wrong, message in (("1", "expected P..Q"), ("2..1", "ran before"), ("1..9", "has no pass '9'")):
        with pytest.raises(UsageError, match=message):
            diff_passes(artifact, wrong)


def test_graph_diff_keeps_lines_that_share_a_name() -> None:
    diff = diff_graphs("output(a)\nx = 1\nx = 2\n", "output(b)\nx = 1\nx = 3\n")
    assert (diff.unchanged, len(diff.changed)) == (1, 1)
    assert diff.changed[0] == ("x #2", "x = 2", "x = 3")
    assert len(diff.appeared) == len(diff.vanished) == 1
    assert diff_graphs("x =  1\n\n", "x = 1").empty
