"""What `compile --dry-run` promises, held against what a compile does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcompiler
from qcompiler.errors import UnsupportedError, UsageError
from tests.cli.process import ROOT
from tests.pipeline.compiled import reference

# Plans first, then compiles, in one process; prints the estimate and the most that the compile held.
MEASURE = """
import json, sys
from pathlib import Path
import qcompiler
from qcompiler.pipeline.memory import PeakAnonymous

def model(name):
    if name == "reference":
        return name
    if name == "tiny":
        from tests.models import tiny
        return tiny("llama")
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4,
    ))

name, output = sys.argv[1:]
plan = qcompiler.plan(model(name))
with PeakAnonymous() as watch:
    qcompiler.compile(model(name), output=output, samples=1, length=32)
print(json.dumps({"estimate": plan["totals"]["peak_bytes"], "memory": plan["totals"]["memory"], "measured": watch.peak}))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the peak of a part of a compile is known on Linux only"
)
@pytest.mark.parametrize(
    "name", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "large"))]
)
def test_peak_memory(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(tmp_path / "out")],
        capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert sum(found["memory"].values()) == found["estimate"]
    assert 0.7 <= found["estimate"] / found["measured"] <= 1.3, found


@pytest.mark.parametrize("target", ["onnx", "onnx-stock", "torch"])
def test_sizes(target: str) -> None:
    plan, made = qcompiler.plan("reference", target=target), reference("int4", target).layers
    assert plan["target"] == target
    for planned, layer in zip(plan["layers"], made["layers"], strict=True):
        for key in ("name", "kind", "role", "shape", "format", "activation", "bytes", "bits_per_weight", "reason"):
            assert planned[key] == layer[key], (layer["name"], key)
        assert "weight_sqnr_db" not in planned and "output_sqnr_db" not in planned
    totals, found = plan["totals"], made["totals"]
    assert (totals["coverage"], totals["bits_per_weight"]) == (found["coverage"], found["bits_per_weight"])
    assert totals["bytes"].keys() == found["bytes"].keys()
    for key in ("codes", "scales", "zeros", "padding"):
        assert totals["bytes"][key] == found["bytes"][key], key
    assert totals["bytes"]["total"] == pytest.approx(found["bytes"]["total"], rel=0.03)
    assert totals["bytes"]["graph"] == pytest.approx(found["bytes"]["graph"], rel=0.3)


def test_a_recipe_that_the_target_cannot_run_is_refused_before_the_model_is_read() -> None:
    with pytest.raises(UnsupportedError, match="linear: .* for int3"):
        qcompiler.plan("./no such model", recipe="int3", target="onnx-stock")
    with pytest.raises(UsageError, match="unknown target 'tensorrt'"):
        qcompiler.plan("./no such model", target="tensorrt")  # type: ignore[arg-type]


def test_strict_groups() -> None:
    from tests.pipeline.test_modules import network, rows

    assert qcompiler.plan(network(), example=(rows(2),))["totals"]["layers"] == 3
    with pytest.raises(UsageError, match="do not divide into groups of 32"):
        qcompiler.plan(network(), example=(rows(2),), strict_groups=True)
