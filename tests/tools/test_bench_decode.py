"""The parts of tools/bench/decode: the random model, the read limit, what is kept, the figures and the tables."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.capture.checkpoint import load
from qcompiler.report import tables
from tools.bench import artifacts, decode, decode_goals, decode_table, models
from tools.bench.decode_limit import Read
from tools.bench.decode_sides import Side
from tools.bench.decode_table import spread

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
    # embedding and head, attention, MLP, norms
    parameters = 2 * 64 * 32 + 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 3 * 32
    assert loaded.notes == [] and sum(p.numel() for p in loaded.model.parameters()) == parameters
    models.random_model(tmp_path / "again", shape)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
    before = (source / "config.json").stat().st_mtime_ns
    assert models.source(models.RANDOM, tmp_path) == str(source) and (source / "config.json").stat().st_mtime_ns == before
    assert models.source("reference", tmp_path) == "reference"


def test_a_random_model_of_another_shape_is_written_anew(tmp_path: Path) -> None:
    shape = models.SHAPES[models.RANDOM] | SMALL
    folder = models.random_model(tmp_path / "m", shape)
    key = artifacts.source_key(str(folder))
    models.random_model(folder, shape | {"intermediate_size": 96})
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 96
    assert artifacts.source_key(str(folder)) != key and artifacts.source_key("reference") == "reference"


def test_the_random_half_billion_has_the_shape_of_the_goals() -> None:
    shape = models.SHAPES["random-0.5b"]
    wanted = dict(
        hidden_size=1280, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=20, num_key_value_heads=4,
        vocab_size=32000,
    )  # fmt: skip
    assert wanted.items() <= shape.items()


def test_reading_a_file_takes_all_of_it(tmp_path: Path) -> None:
    np.arange(2**17, dtype=np.uint64).tofile(tmp_path / "data")
    read = Read(tmp_path / "data", 2)
    assert 1e6 < read.best() < 1e13


def make(path: Path, text: str) -> dict[str, Any]:
    """Counts how often it was called for `path`."""
    calls = path.with_suffix(".calls")
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    path.write_text(text)
    return {"calls": count}


def test_what_was_made_is_kept_until_what_it_was_made_from_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:  # in this process: a new one takes seconds, and is `compile`'s matter
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function: Any, *arguments: Any) -> Any:
            return argparse.Namespace(result=lambda: function(*arguments))

    monkeypatch.setattr(artifacts, "ProcessPoolExecutor", Here)
    path = tmp_path / "made"
    first = artifacts.kept(path, {"a": (1, 2)}, make, "x")
    assert first["calls"] == 1 and first["seconds"] >= 0 and path.read_text() == "x"
    assert artifacts.kept(path, {"a": (1, 2)}, make, "y") == first and path.read_text() == "x"
    assert artifacts.kept(path, {"a": (1, 3)}, make, "y")["calls"] == 2 and path.read_text() == "y"
    assert artifacts.kept(path, {"a": (1, 3)}, make, "z", again=True)["calls"] == 3
    path.unlink()
    assert artifacts.kept(path, {"a": (1, 3)}, make, "z")["calls"] == 4


# ---- figures


def rounds_of(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Three rounds on a machine that is slower from round to round: the ratios stay."""
    return [
        {
            "limits": dict.fromkeys(rates, 2e10 / slow),
            "sides": {
                name: {
                    "prefill": 10 * rate / slow, "decode": rate / slow, "load": 2 / slow, "steps": [slow / rate] * 4,
                    "busy": 1.9, "idle_share": 0.001 * slow,
                }
                for name, rate in rates.items()
            },
        }
        for slow in (1, 2, 4)
    ]  # fmt: skip


def case(ours: float, peer: float, model: str = "m") -> dict[str, Any]:
    facts = {"path": "/p", "seconds": 12.0, "peak_bytes": 2e9, "bytes_a_token": 30_000_000, "file_bytes": 40_000_000}
    sides = {side.name: side for side in (Side("ours", "int4", facts), Side("ours", "vq2", facts), Side("llama", "Q4_0", facts))}
    rates = dict(zip(sides, (ours, 2 * ours, peer), strict=True))
    memory = {"loaded_anonymous": 1_000_000, "loading_anonymous": 3_000_000, "anonymous": 5_000_000, "resident": 45_000_000}
    examined = {name: {"cosine": 0.95, "memory": memory} for name in sides}
    rounds = rounds_of(rates)
    return {
        "model": model, "parameters": 5_000_000, "prompt_tokens": 512, "ours": ["int4", "vq2"], "peers": ["llama.cpp Q4_0"],
        "skipped": {"OpenVINO int4": "openvino not installed"},
        "read_bytes_per_second": spread([limit for r in rounds for limit in r["limits"].values()]),
        "sides": decode.summaries(rounds, sides, ["int4", "llama.cpp Q4_0"], examined), "idle_share": 0.004,
    }  # fmt: skip


def test_ratios_are_those_of_the_same_round() -> None:
    sides = case(120.0, 100.0)["sides"]
    ratio = sides["int4"]["ratios"]["llama.cpp Q4_0"]
    assert all(ratio[rate]["samples"] == pytest.approx([1.2] * 3) for rate in ("decode", "prefill"))
    assert ratio["step"] == pytest.approx(1.2) and ratio["load"]["median"] == pytest.approx(1)
    assert sides["vq2"]["ratios"]["int4"]["decode"]["median"] == pytest.approx(2)
    # 120 tokens a second of 30 MB each, of 20 GB/s: in every round
    assert sides["int4"]["share_of_read"]["samples"] == pytest.approx([0.18] * 3)
    assert sides["int4"]["load_seconds"]["median"] == pytest.approx(1)


CHOSEN = argparse.Namespace(threads=2, repeats=3, tokens=4, past=2)


def shown(document: tables.Document) -> str:
    stream = io.StringIO()
    tables.show(document, stream=stream)
    return " ".join(stream.getvalue().split())


@pytest.mark.parametrize(("ours", "verdict"), [
    (120.0, "ours are faster than every peer"), (90.0, "THE PEER IS FASTER: int4 / llama.cpp Q4_0 0.90"),
])  # fmt: skip
def test_the_tables_say_who_is_faster(ours: float, verdict: str) -> None:
    document = decode_table.document([case(ours, 100.0)], CHOSEN)
    text = shown(document)
    assert f"m, decode, tokens/s / the column's: {verdict}" in text
    assert f"m, prompt of 512, tokens/s / the column's: {verdict}" in text
    assert "OpenVINO int4 skipped: openvino not installed" in text and "goals met" not in text
    data = json.loads(document.to_json())
    assert data["report"] == "bench-decode" and data["packages"]["onnxruntime"] and len(data["commit"]) in (0, 40)
    ratio = data["cases"][0]["sides"]["int4"]["ratios"]["llama.cpp Q4_0"]["decode"]["median"]
    assert ratio == pytest.approx(ours / 100) and data["cases"][0]["goals"] == []


def test_goals_are_held_against_the_best_of_the_peers() -> None:
    found = case(120.0, 100.0, models.RANDOM)
    goals = {goal["what"]: goal for goal in decode_goals.goals(found)}
    assert goals["int4: decode / read limit"]["found"] == pytest.approx(0.18) and not goals["int4: decode / read limit"]["met"]
    assert not goals["int4 / llama.cpp Q4_0: decode"]["met"] and goals["vq2 / llama.cpp Q4_0: decode"]["met"]
    assert goals["vq2 / llama.cpp's best: prefill"]["found"] == pytest.approx(2.4)
    assert goals["int4: 1 - anonymous memory after load / file"]["found"] == pytest.approx(0.975)
    assert "vq2 / llama.cpp Q2_K: decode" not in goals and "int8: decode / read limit" not in goals
    text = shown(decode_table.document([found], CHOSEN))
    assert f"{sum(goal['met'] for goal in goals.values())} of {len(goals)} goals met" in text
