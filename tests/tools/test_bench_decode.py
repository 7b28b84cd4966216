"""The parts of tools/bench/decode: the random model, the read limit, the table."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler.capture.checkpoint import load
from qcompiler.report import tables
from tools.bench import artifacts, decode, limit, models

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


def test_the_random_model_is_a_checkpoint_and_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = models.SHAPES[models.RANDOM] | SMALL
    monkeypatch.setattr(models, "SHAPES", {models.RANDOM: shape})
    source = Path(models.source(models.RANDOM, tmp_path))
    assert source == tmp_path / "models" / models.RANDOM
    written = (source / "model.safetensors").read_bytes()
    loaded = load(source)
    parameters = 64 * 32 + 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 3 * 32  # embedding, attention, MLP, norms
    assert loaded.notes == [] and sum(p.numel() for p in loaded.model.parameters()) == parameters
    models.random_model(tmp_path / "again", shape)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
    before = (source / "config.json").stat().st_mtime_ns
    assert models.source(models.RANDOM, tmp_path) == str(source) and (source / "config.json").stat().st_mtime_ns == before
    assert models.source("reference", tmp_path) == "reference"


def test_reading_a_file_takes_all_of_it(tmp_path: Path) -> None:
    np.arange(2**17, dtype=np.uint64).tofile(tmp_path / "data")
    read = limit.Read(tmp_path / "data", 2)
    assert 1e6 < read.once(2) < 1e13
    assert read.best() > 0


def spread(value: float) -> dict:
    return {"median": value, "q1": 0.9 * value, "q3": 1.1 * value, "samples": [value]}


def case(ours: float, peer: float) -> dict:
    def side(rate: float) -> dict:
        ratios = {
            what: {"prefill": spread(rate / base), "decode": spread(rate / base), "load": spread(1.0)}
            for what, base in (("first", ours), ("peer", peer))
        }
        return {
            "decode": spread(rate), "step": spread(1000 / rate), "prefill": spread(10 * rate), "load_seconds": spread(0.5),
            "read_bytes_per_second": spread(2e10), "share_of_read": spread(0.5), "bytes_a_token": 3_000_000,
            "ratios": ratios, "step_ratio": rate / peer,
            "file_bytes": 4_000_000, "compile": {"seconds": 12.0, "processor_seconds": 10.0, "peak_bytes": 2e9},
        }  # fmt: skip

    return {
        "model": "m", "recipes": ["int4", "vq2"], "parameters": 5_000_000, "prompt_tokens": 128, "first": "int4",
        "peer": "onnx-stock int4", "sides": {"int4": side(ours), "vq2": side(2 * ours), "onnx-stock int4": side(peer)},
    }  # fmt: skip


@pytest.mark.parametrize(("ours", "peer", "verdict"), [(120.0, 100.0, "ours is faster"), (90.0, 100.0, "THE PEER IS FASTER")])
def test_the_table_says_who_is_faster(ours: float, peer: float, verdict: str) -> None:
    chosen = argparse.Namespace(threads=2, repeats=3, tokens=8)
    document = decode._document([case(ours, peer)], chosen)
    stream = io.StringIO()
    tables.show(document, stream=stream)
    said = f"decode int4 / onnx-stock int4 {ours / peer:.2f}, {verdict}; vq2 / int4 2.00"
    assert said in " ".join(stream.getvalue().split())
    data = json.loads(document.to_json())
    assert data["report"] == "bench-decode" and data["machine"]["versions"]["onnxruntime"] and len(data["commit"]) in (0, 40)
    assert data["cases"][0]["sides"]["int4"]["ratios"]["peer"]["decode"]["median"] == pytest.approx(ours / peer)


def test_the_targets_are_ours_and_the_peer() -> None:
    assert artifacts.TARGETS == (decode.OURS, decode.PEER) == ("onnx", "onnx-stock")
