"""The benchmark of attention: two ops that compute the same, and a line for every case."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime

from qcompiler.runtime import library
from tools.bench import attention


def test_both_sides_compute_the_same():
    past, new, heads, kv_heads, size = 5, 3, 4, 2, 16
    rng, outputs = np.random.default_rng(0), []
    feeds = {
        "query": rng.standard_normal((1, new, (heads + 2 * kv_heads) * size), np.float32),
        "past_key": rng.standard_normal((1, kv_heads, past + new, size), np.float32),
        "past_value": rng.standard_normal((1, kv_heads, past + new, size), np.float32),
        "last": np.array([past + new - 1], np.int32), "total": np.array(past + new, np.int32),
        "cos": rng.standard_normal((past + new, size // 2), np.float32),
        "sin": rng.standard_normal((past + new, size // 2), np.float32),
        "positions": np.arange(past, past + new)[None],
    }  # fmt: skip
    for name, model in attention.models(heads, kv_heads, size).items():
        options = onnxruntime.SessionOptions()
        if name == "ours":
            options.register_custom_ops_library(str(library.library_path()))
        outputs.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(["y"], feeds)[0])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-5)


def test_a_line_and_figures_for_every_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "LEAST", 0.0001)
    path = tmp_path / "figures.json"
    arguments = "attention --cases 4:1,0:3 --threads 1 --heads 2 --kv-heads 1 --head-size 16 --megabytes 1 --rounds 2 --json"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(path)])
    assert attention.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [["4", "1"], ["0", "3"]]
    found = json.loads(path.read_text())
    assert found["settings"]["heads"] == 2 and len(found["cases"]) == 2
    for case in found["cases"]:
        assert all(low <= middle <= high for middle, low, high in [case["ratio"], case["share_of_read"]])
