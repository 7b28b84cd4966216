"""A small classifier of texts from end to end: any batch and length, padding, the command line."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
from qcompiler.cli import main
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.runtime.session import Session
from tests.artifacts import REFERENCE
from tests.pipeline.fake_quantized import fake_quantized

TOLERANCE = 1e-3  # relative to the largest output: activations on the edge between two codes may fall on either side
VOCABULARY = 4096  # of the reference model's tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier") / "tiny-bert"
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder)
    return folder


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> qcompiler.CompileResult:
    return qcompiler.compile(checkpoint, output=checkpoint.parent / "out", recipe="int4", samples=2, length=32)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return transformers.BertForSequenceClassification.from_pretrained(checkpoint).eval()


def batch(*lengths: int) -> dict[str, np.ndarray]:
    """Texts of these lengths, padded to the longest."""
    generator = np.random.default_rng(len(lengths))
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = generator.integers(3, VOCABULARY, length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(1,), (9,), (3, 20, 11), (128, 5)])
def test_any_batch_and_length(compiled: qcompiler.CompileResult, model: torch.nn.Module, lengths: tuple) -> None:
    feeds = batch(*lengths)
    (found,) = Session(compiled.path, threads=1).run(**feeds).values()
    with torch.no_grad():
        rounded = fake_quantized(model, compiled.quantizer)
        expected = rounded(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    assert found.shape == expected.shape == (len(lengths), 3)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_padding_changes_nothing(compiled: qcompiler.CompileResult) -> None:
    session = Session(compiled.path, threads=1)
    feeds = batch(4, 30, 17)
    (together,) = session.run(**feeds).values()
    for row, length in enumerate((4, 30, 17)):
        # Alone, and without a mask: that of one whole text is filled in.
        (alone,) = session.run(input_ids=feeds["input_ids"][row : row + 1, :length]).values()
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4 * np.abs(together).max())


def test_manifest(compiled: qcompiler.CompileResult) -> None:
    manifest = compiled.manifest
    assert (manifest["kind"], manifest["cache"], manifest["context"]) == ("encoder", None, 128)
    roles = {port["name"]: port["role"] for port in manifest["inputs"]}
    assert roles == {"input_ids": "tokens", "attention_mask": "mask", "token_type_ids": "token_types"}
    assert all(port["shape"] == ["batch", "length"] for port in manifest["inputs"])
    assert manifest["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 3], "role": "logits"}]


def test_a_model_in_memory_tells_its_context_and_tokens(model: torch.nn.Module, tmp_path: Path) -> None:
    manifest = qcompiler.compile(model, output=tmp_path / "out", recipe="int4", samples=0).manifest
    assert manifest["context"] == 128 and manifest["tokens"]["pad"] == 0
    assert manifest["model"]["source"] == "BertForSequenceClassification"


def command(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in (*arguments, "--quiet")]) == 0
    return out.getvalue()


def test_evaluation(compiled: qcompiler.CompileResult, checkpoint: Path) -> None:
    scores = evaluate(str(compiled.path), against=str(checkpoint), max_windows=3, context=64, threads=1)
    assert scores["kind"] == "outputs"
    (output,) = scores["outputs"].values()
    assert 0.9 < output["cosine"] < 1 and 5 < output["sqnr_db"] < 60 and output["max_error"] > 0
    options = ("--against", checkpoint, "--max-windows", 3, "--context", 64)
    assert json.loads(command("eval", compiled.path, *options, "--json"))["outputs"]["logits"] == pytest.approx(output)
    table = command("eval", compiled.path, *options)
    assert "cosine" in table and "logits" in table


def test_run_prints_the_vector(compiled: qcompiler.CompileResult) -> None:
    vector = json.loads(command("run", compiled.path, "two words"))
    assert len(vector) == 3 and all(isinstance(value, float) for value in vector)
    assert vector != json.loads(command("run", compiled.path, "something else entirely"))
