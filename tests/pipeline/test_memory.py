"""Models larger than memory: what loading and compiling a checkpoint of 246 MB hold that no file backs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.process import ROOT
from tools.random_checkpoint import Shape, main, write

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells what memory no file backs"
)
MIB = 2**20
# Few layers, wide ones: what grows with the number of nodes is small beside the weights.
SHAPE = Shape(hidden=2048, mlp=5632, layers=2, heads=16, kv_heads=4, vocab=8192)
RECIPE = {
    "name": "plain", "linear": {"bits": 4, "group": 32, "activations": "int8-block128"}, "embed": {"bits": 8},
    "head": {"bits": 8, "activations": "int8-token"}, "passes": [{"round_to_nearest": {"clipping": "minmax"}}],
}  # fmt: skip

# Prints what was held beyond the imports, as JSON; everything that is imported on the way has been before.
LOAD = """
import sys, json
from qcompiler.pipeline.memory import PeakAnonymous
from qcompiler.capture.checkpoint import load
load("reference", as_it_is_stored=True)
with PeakAnonymous() as watch:
    loaded = load(sys.argv[1], as_it_is_stored=True)
print(json.dumps({"growth": watch.growth, "parameters": sum(p.numel() for p in loaded.model.parameters())}))
"""
COMPILE = """
import sys, json
import qcompiler
import torch, transformers, onnx_ir, onnxscript, torch.onnx
from transformers import LlamaForCausalLM
from qcompiler.pipeline.memory import PeakAnonymous
with PeakAnonymous() as watch:
    qcompiler.compile(sys.argv[1], output=sys.argv[2], recipe=json.loads(sys.argv[3]), samples=1, length=32)
print(json.dumps({"growth": watch.growth}))
"""


def measured(program: str, *arguments: object) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=3600, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "bfloat16"
    write(folder, SHAPE, shard_bytes=100 * MIB)
    return folder


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_loading_bfloat16_maps_the_weights(checkpoint: Path) -> None:
    found = measured(LOAD, checkpoint)
    assert 2 * found["parameters"] == pytest.approx(weights(checkpoint), rel=0.001)
    assert found["growth"] < weights(checkpoint) / 10, found


def test_loading_float32_maps_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "model", SHAPE, dtype="float32")
    found = measured(LOAD, tmp_path / "model")
    assert found["growth"] < weights(tmp_path / "model") / 10, found


def test_compiling_holds_less_than_a_quarter_of_the_weights_and_half_a_gibibyte(checkpoint: Path, tmp_path: Path) -> None:
    found = measured(COMPILE, checkpoint, tmp_path / "out", json.dumps(RECIPE))
    assert found["growth"] < weights(checkpoint) / 4 + 512 * MIB, found
    # Far less than any way of holding the model: 492 MB in float32, 123 MB of codes, 80 MB packed.
    assert found["growth"] < 320 * MIB, found
    assert not [path.name for path in tmp_path.iterdir() if path.name != "out"]


# Deep and narrow: what one site takes to solve is small beside the whole.
DEEP = Shape(hidden=1024, mlp=2816, layers=22, heads=16, kv_heads=4, vocab=8192)
GPTQ = RECIPE | {"name": "solved", "passes": [{"round_to_nearest": {"kind": "embedding"}}, "gptq", "round_to_nearest"]}
WITHIN = COMPILE.replace("samples=1, length=32", "samples=8, length=128, memory=int(sys.argv[4])")


@pytest.mark.slow
def test_gptq_keeps_a_budget_of_a_quarter_of_the_weights(tmp_path: Path) -> None:
    """The budget and half a gibibyte, which is for capture and export."""
    write(tmp_path / "model", DEEP, dtype="float32")
    budget = weights(tmp_path / "model") // 4
    assert budget > 250 * MIB
    found = measured(WITHIN, tmp_path / "model", tmp_path / "out", json.dumps(GPTQ), budget)
    assert found["growth"] < budget + 512 * MIB, found


def test_a_random_checkpoint_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "not an empty directory" in capsys.readouterr().err


def test_equal_arguments_give_equal_checkpoints(tmp_path: Path) -> None:
    small = Shape(hidden=32, mlp=48, layers=1, heads=2, kv_heads=1, vocab=4096)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write(tmp_path / name, small, seed=seed, tied=True, shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    read = lambda folder: [(tmp_path / folder / name).read_bytes() for name in files]  # noqa: E731
    assert read("one") == read("same") and read("one") != read("other")
    assert sum(name.endswith(".safetensors") for name in files) > 1
