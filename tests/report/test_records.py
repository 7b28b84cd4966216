"""Reading an artifact's records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qcompiler.artifact.manifest import seal
from qcompiler.errors import GateError, InputError
from qcompiler.report.records import load_records
from tests.report import fake


def test_layers_passes_and_timings(tmp_path: Path) -> None:
    records = load_records(fake.write(tmp_path / "out"))
    q, k = records.layers
    assert (q.name, q.shape, q.format, q.bytes, q.weight_sqnr_db) == (fake.Q, (256, 256), "int4-g32-sym", 36864, 21.4)
    assert q.to_dict() == fake.layer(fake.Q) | {"shape": [256, 256]}
    assert k.weight_sqnr_db == math.inf and k.reason == "left out by the recipe"
    assert [record.label for record in records.passes] == ["000-capture", "001-find_sites", "002-round_to_nearest"]
    assert records.passes[1].skipped[0] == ("mm_1", "the weight is no constant")
    assert records.passes[2].milliseconds == 12.5 and records.passes[2].peak_rss_bytes == 2**29
    assert records.graph_text(records.passes[2]) == fake.SOLVED
    assert records.totals["coverage"] == 0.5


def test_state_after_a_pass_is_the_union_up_to_it(tmp_path: Path) -> None:
    records = load_records(fake.write(tmp_path / "out"))
    assert records.state_after(0) == {}
    assert records.state_after(1) == {fake.Q: {"format": "float32", "bytes": 262144}, fake.K: {"format": "float32"}}
    assert records.state_after(2)[fake.Q] == {"format": "int4-g32-sym", "bytes": 36864, "weight_sqnr_db": 21.4}


def test_an_unknown_key_of_a_layer_is_kept(tmp_path: Path) -> None:
    files = fake.records()
    files["layers.json"]["layers"][0]["codebook"] = 256
    records = load_records(fake.write(tmp_path / "out", files))
    assert records.layers[0].more == {"codebook": 256} and records.layers[0].to_dict()["codebook"] == 256


def test_text_with_odd_line_ends_in_a_record(tmp_path: Path) -> None:
    files = fake.records()
    files["trace/passes.jsonl"][1]["skipped"] = [{"node": "a\u2028b", "reason": "x\x85y"}]
    assert load_records(fake.write(tmp_path / "out", files)).passes[1].skipped == (("a\u2028b", "x\x85y"),)


@pytest.mark.parametrize("name", ["layers.json", "trace/passes.jsonl", "trace/timings.jsonl"])
def test_a_damaged_record_is_refused(tmp_path: Path, name: str) -> None:
    target = fake.write(tmp_path / "out")
    path = target / name
    path.write_bytes(path.read_bytes().replace(b"4", b"5", 1))
    with pytest.raises(GateError, match="SHA-256"):
        load_records(target)
    path.unlink()
    with pytest.raises(GateError, match="cannot be read"):
        load_records(target)


@pytest.mark.parametrize(
    "content",
    [b"not json", b"\xff", b"[]", {"schema": 2, "layers": []}, {"schema": 1}, {"schema": 1, "layers": [{}]},
     {"schema": 1, "layers": [{"name": "a", "format": "b", "shape": 3}]}, {"schema": 1, "layers": "x"},
     {"schema": 1, "layers": [{"name": "a", "format": "b", "weight_sqnr_db": "loud"}]}, b"[" * 100_000],
)  # fmt: skip
def test_a_record_that_is_not_as_the_format_says(tmp_path: Path, content: object) -> None:
    target = fake.write(tmp_path / "out", fake.records() | {"layers.json": content})
    with pytest.raises(InputError, match="out"):
        load_records(target)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_records(tmp_path / "no")
    with pytest.raises(InputError, match="not a qcompiler artifact"):
        load_records(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    target = fake.write(tmp_path / "out")
    manifest = json.loads((target / "manifest.json").read_bytes())
    (target / "manifest.json").write_bytes(seal(manifest | {"schema": 2}))
    with pytest.raises(InputError, match="schema 2, expected 1"):
        load_records(target)


def test_a_link_out_of_the_artifact_is_not_read(tmp_path: Path) -> None:
    target = fake.write(tmp_path / "out")
    (target / "layers.json").rename(tmp_path / "layers.json")
    (target / "layers.json").symlink_to("../layers.json")
    with pytest.raises(InputError, match="out of the artifact"):
        load_records(target)


def test_a_graph_path_that_leaves_is_not_read(tmp_path: Path) -> None:
    files = fake.records()
    files["trace/passes.jsonl"][2]["graph"] = "../secret"
    records = load_records(fake.write(tmp_path / "out", files))
    with pytest.raises(InputError, match="cannot be a file of an artifact"):
        records.graph_text(records.passes[2])
