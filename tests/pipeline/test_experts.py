"""A mixture of experts from end to end: formats by role, experts that no sample reaches, generation, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.errors import GateError, UnsupportedError
from qcompiler.report.progress import Silent

FLOAT = {"bits": 8, "group": 32, "activations": "float"}
RECIPE = {"name": "mixture", "linear": FLOAT, "embed": {"bits": 8, "group": 32}, "head": FLOAT}


def mixture() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_formats_notes_and_tokens(tmp_path: Path) -> None:
    model, reporter = mixture(), Notes()
    chosen = RECIPE | {"overrides": [{"select": {"role": "expert"}, "scheme": FLOAT | {"bits": 8, "group": 64}}]}
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=chosen, samples=1, length=2, reporter=reporter)
    layers = {layer["name"]: layer for layer in result.layers["layers"] if layer["kind"] == "experts"}
    path = "model.layers.0.mlp.experts"
    assert {name: (v["shape"], v["experts"], v["format"]) for name, v in layers.items()} == {
        f"{path}.gate_up_proj": ([192, 64], 8, "int8-g64-sym"),
        f"{path}.down_proj": ([64, 96], 8, "int8-g64-sym"),
    }
    assert result.layers["totals"]["coverage"] == 1
    # 12 tiles of 64 columns; 4 tiles of 96 columns in two groups; a byte a code, two a scale
    assert [v["bytes"] for v in layers.values()] == [8 * (192 * 64 + 192 * 2), 8 * (64 * 96 + 64 * 2 * 2)]
    assert all(v["output_sqnr_db"] > 30 for v in layers.values())
    missed = [note for note in reporter.notes if "no row of the samples meets expert" in note]
    assert [note.split(":")[0] for note in missed] == list(layers)  # two tokens reach four of eight at most

    session = qcompiler.Session(tmp_path / "out", threads=1)
    prompt = [5, 6, 7]
    found = [token.id for token in qcompiler.generate(session, prompt, max_tokens=8)]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for token in found:
            logits = model(ids).logits[0, -1]
            assert logits.max() - logits[token] < 0.05 * logits.abs().max()  # the float model's choice, or as good
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_static_activations_are_refused_by_name(tmp_path: Path) -> None:
    chosen = RECIPE | {"linear": {"bits": 8, "group": 0, "activations": "int8-static"}}
    with pytest.raises(UnsupportedError, match="mlp.experts.gate_up_proj: experts take no int8-static"):
        qcompiler.compile(mixture(), output=tmp_path / "out", recipe=chosen, samples=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_experts_in_float_count_against_coverage_and_compute_the_same(tmp_path: Path) -> None:
    model = mixture()
    chosen = RECIPE | {"overrides": [{"select": {"role": "expert"}, "scheme": "float"}]}
    with pytest.raises(GateError, match="experts.gate_up_proj: 393216 bytes: the recipe keeps it in float"):
        qcompiler.compile(model, output=tmp_path / "refused", recipe=chosen, samples=0)
    for target in ("onnx", "torch"):
        allowed = recipes.load(chosen | {"allow": {"min_coverage": 0.0}})
        qcompiler.compile(model, output=tmp_path / target, recipe=allowed, samples=0, target=target)
    tokens = np.arange(3, 9)
    logits = [np.atleast_2d(qcompiler.Session(tmp_path / t, threads=1).prefill(tokens))[-1] for t in ("onnx", "torch")]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * np.abs(logits[1]).max()


@pytest.mark.slow
def test_the_stock_target_computes_what_ours_does(tmp_path: Path) -> None:
    model = mixture()
    for target in ("onnx", "onnx-stock"):
        qcompiler.compile(model, output=tmp_path / target, recipe=RECIPE, samples=0, target=target)
    tokens = np.arange(3, 9)
    found, expected = (
        np.atleast_2d(qcompiler.Session(tmp_path / t, threads=1).prefill(tokens))[-1] for t in ("onnx-stock", "onnx")
    )
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
