"""Decoders without a cache: one graph of the whole text, from capture to a session that generates."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.artifact.manifest import seal
from qcompiler.capture.feeds import feed
from qcompiler.capture.prepare import prepare
from qcompiler.emit import _limits
from qcompiler.errors import CapacityError, GateError, UsageError
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.evaluate.targets import open_target
from qcompiler.recipe import Allow
from qcompiler.report.compiled import compiled_document
from qcompiler.report.inspect import inspect_artifact
from qcompiler.report.tables import Text
from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session
from tests.captures import ANALYSE, NORMALISE, Analysed, captured, relative_error, run
from tests.pipeline.rewire import float_artifact
from tests.pipeline.test_architectures import FakeQuantized

VOCABULARY = 96
SIZES = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)


def build(cls, config) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def without_cache() -> Analysed:
    """Its forward pass knows no cache."""
    model = build(transformers.OpenAIGPTLMHeadModel, transformers.OpenAIGPTConfig(**SIZES))
    prepared = prepare(model)
    graph = captured(prepared)
    return Analysed(model, prepared, graph, run(graph, NORMALISE) | run(graph, ANALYSE), {})


class Keeping(transformers.LlamaForCausalLM):
    """Has a cache and gives none out of a step, so that no graph can carry it."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        output = super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        output.past_key_values = None
        return output


def keeping() -> transformers.PreTrainedModel:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    return build(Keeping, transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))


@functools.cache
def compiled(folder: str, target: str) -> qcompiler.CompileResult:
    return qcompiler.compile(without_cache().model, output=Path(folder) / target, recipe=RECIPE, target=target, samples=0)


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


RECIPE = replace(recipes.load("int4-weights"), allow=Allow(min_coverage=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("whole"))


def test_the_graph_computes_the_whole_text_at_every_length() -> None:
    case = without_cache()
    assert (case.prepared.kind, case.prepared.whole, case.prepared.fallbacks) == ("decoder", "the model has no cache", [])
    (note,) = case.prepared.notes
    assert "costs the whole text" in note
    for length in (1, 2, 7, 40, 64):
        tokens = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, found = case.model(input_ids=tokens).logits, case.graph.module(**feed(case.prepared, tokens)).logits
        assert relative_error({"x": found}, {"x": expected}) < 1e-5


def test_a_session_computes_what_the_fake_quantized_graph_computes(folder: str, tmp_path: Path) -> None:
    case, result = without_cache(), compiled(folder, "onnx")
    manifest = result.manifest
    assert manifest["cache"] is None and manifest["whole_text"] == {"reason": "the model has no cache", "causal": True}
    assert manifest["fallbacks"] == []
    assert result.quantizer.trace.entries[0].record["notes"]["whole_text"] == "the model has no cache"
    context = result.quantizer.context
    fake = FakeQuantized(case, context.solutions, context.schemes, True)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 30)
    with torch.no_grad():
        expected = fake.run(torch.from_numpy(tokens)[None])
    expected = next(iter(torch.utils._pytree.tree_leaves(expected)))[0].numpy()
    session = Session(float_artifact(result.path, tmp_path / "float"), threads=1)
    for _ in range(2):  # the second time after a reset
        session.reset()
        found = [session.prefill(tokens[:11]), session.step(int(tokens[11])), session.prefill(tokens[12:29])]
        assert session.length == 29
        np.testing.assert_allclose(np.stack(found), expected[[10, 11, 28]], atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(session.logits(tokens), expected, atol=1e-4 * np.abs(expected).max())


def test_generation_is_the_models_own_greedy_text(folder: str) -> None:
    """Weights as they are dequantized, put into the model: then transformers' own generation picks the same tokens."""
    result = compiled(folder, "onnx")
    model = copy.deepcopy(without_cache().model)
    with torch.no_grad():
        for name, solution in result.quantizer.context.solutions.items():
            layer, dense = model.get_submodule(name), solution.dequantize()
            layer.weight.copy_(dense.T if isinstance(layer, Conv1D) else dense)
    prompt = [5, 9, 17, 40]
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    generation = generate(Session(result.path, threads=1), prompt, max_tokens=12)
    assert [token.id for token in generation] == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_the_torch_target_computes_the_same(folder: str) -> None:
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, 12)
    logits = []
    for target in ("onnx", "torch"):
        session = Session(compiled(folder, target).path, threads=1)
        logits.append([session.prefill(tokens[:9]), *(session.step(int(token)) for token in tokens[9:])])
    np.testing.assert_allclose(*logits, atol=1e-4 * np.abs(logits[0]).max())


def test_a_text_beyond_the_context_is_refused_and_the_session_stays_usable(folder: str) -> None:
    session = Session(compiled(folder, "onnx").path, threads=1)
    with pytest.raises(CapacityError, match="65 positions, but the model's context is 64"):
        session.prefill(np.full(65, 5))
    session.prefill(np.full(64, 5))
    with pytest.raises(CapacityError, match="the model's context is 64"):
        session.step(5)
    assert session.length == 64


def limited(artifact: Path, target: Path, **limits: Any) -> Session:
    """A copy of an artifact whose manifest says what its graph is not right for."""
    shutil.copytree(artifact, target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    (target / "manifest.json").write_bytes(seal(manifest | limits))
    return Session(target, threads=1)


def test_a_text_shorter_than_the_graph_takes_is_filled_up(folder: str, tmp_path: Path) -> None:
    artifact = compiled(folder, "onnx").path
    session, filling = Session(artifact, threads=1), limited(artifact, tmp_path / "short", shortest=8)
    fed = []
    run_graph = filling._outputs
    filling.decoder._run = lambda given: fed.append(given["input_ids"].shape[1]) or run_graph(given)  # type: ignore[attr-defined]
    tokens = np.random.default_rng(2).integers(3, VOCABULARY, 9)
    for given in (tokens[:3], tokens[3:4], tokens[4:]):
        np.testing.assert_allclose(filling.prefill(given), session.prefill(given), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(filling.logits(tokens[:5]), session.logits(tokens[:5]), rtol=1e-5, atol=1e-6)
    assert fed == [8, 8, 9, 8]


def test_a_text_longer_than_the_graph_is_right_for_is_refused(folder: str, tmp_path: Path) -> None:
    session = limited(compiled(folder, "onnx").path, tmp_path / "long", longest=10)
    session.prefill(np.full(10, 5))
    with pytest.raises(CapacityError, match="11 tokens are more than the 10 that .* was compiled for"):
        session.step(5)
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. ")
    assert evaluate(session, text=[text], tokenizer=Letters())["context"] == 10


def test_a_cache_that_no_graph_can_carry_is_a_fallback_that_has_to_be_allowed(tmp_path: Path) -> None:
    model = keeping()
    prepared = prepare(model)
    assert prepared.whole is not None and "no cache that comes out of a step" in prepared.whole
    message = r"(?s)capture: 1 fallbacks, 0 allowed:\n  cache: the whole text .*allow: \{fallbacks: 1\}"
    with pytest.raises(GateError, match=message):
        qcompiler.compile(model, output=tmp_path / "out", recipe=RECIPE, samples=0)
    assert not (tmp_path / "out").exists()
    allowed = replace(RECIPE, allow=Allow(min_coverage=0, fallbacks=1))
    manifest = qcompiler.compile(model, output=tmp_path / "out", recipe=allowed, samples=0).manifest
    assert [fallback["node"] for fallback in manifest["fallbacks"]] == ["cache"]
    assert manifest["whole_text"]["reason"] == prepared.whole
    for document in (compiled_document(tmp_path / "out", 1.0), inspect_artifact(tmp_path / "out")):
        text = "\n".join(line for block in document.blocks if isinstance(block, Text) for line in block.lines)
        assert "every token costs the whole text" in text and prepared.whole in text


def test_evaluation_sees_a_language_model(folder: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    result = evaluate(
        Session(compiled(folder, "onnx").path, threads=1), without_cache().model, text=[text], context=32, tokenizer=Letters()
    )
    assert result["kind"] == "language-model" and result["perplexity"] > 1 and result["same_top"] > 0.5


class LooksAhead(transformers.OpenAIGPTLMHeadModel):
    """Every token is seen together with the last one."""

    def forward(self, input_ids=None, **kwargs):
        embedded = self.transformer.tokens_embed(input_ids)
        return super().forward(inputs_embeds=embedded + embedded[:, -1:], **kwargs)


def test_a_model_whose_later_tokens_change_earlier_logits_is_no_language_model_to_evaluation(folder: str, tmp_path: Path) -> None:
    model = build(LooksAhead, transformers.OpenAIGPTConfig(**SIZES))
    prepared = prepare(model)
    assert not prepared.causal and any("later tokens change the logits of earlier ones" in note for note in prepared.notes)
    found = _limits(prepared)["extra"]
    assert found["whole_text"] == {"reason": "the model has no cache", "causal": False}
    assert open_target(limited(compiled(folder, "onnx").path, tmp_path / "ahead", **found)).causal is False


class Otherwise(transformers.OpenAIGPTLMHeadModel):
    """Generates from more than the text."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": torch.cat([input_ids, input_ids[:, :1]], 1)}


def test_a_float_model_that_looks_ahead_has_no_perplexity_either() -> None:
    assert open_target(build(LooksAhead, transformers.OpenAIGPTConfig(**SIZES))).causal is False
    assert open_target(without_cache().model).causal is True


def test_a_model_that_generates_from_more_than_the_text_is_an_encoder_which_is_a_fallback() -> None:
    (fallback,) = prepare(build(Otherwise, transformers.OpenAIGPTConfig(**SIZES))).fallbacks
    assert fallback.node == "generation" and "an encoder in place of a decoder" in fallback.reason
    assert "it generates from more than the text, whose own logits differ by" in fallback.reason


@pytest.mark.slow
def test_such_an_encoder_has_the_models_logits_and_no_perplexity(tmp_path: Path) -> None:
    model = build(Otherwise, transformers.OpenAIGPTConfig(**SIZES))
    recipe = replace(recipes.load("int8-weights"), allow=Allow(min_coverage=0, fallbacks=1))
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=recipe, samples=0)
    assert [found["node"] for found in result.manifest["fallbacks"]] == ["generation"]
    assert result.manifest["kind"] == "encoder" and [port["name"] for port in result.manifest["outputs"]] == ["logits"]
    session = Session(result.path, threads=1)
    tokens = np.random.default_rng(2).integers(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(session.run(input_ids=tokens)["logits"] - expected).max() < 0.02 * np.abs(expected).max()
    with pytest.raises(UsageError, match="is of kind 'encoder', not a decoder"):
        generate(session, [5, 9])
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. ")
    with pytest.raises(UsageError, match="does not predict the next token, so it has no perplexity"):
        evaluate(session, text=[text], context=16, tokenizer=Letters())
    against = evaluate(session, model, text=[text], context=16, tokenizer=Letters())
    assert against["kind"] == "outputs" and against["outputs"]["logits"]["cosine"] > 0.999


def test_what_a_model_keeps_for_the_next_text_is_no_output() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32)
    model = build(transformers.XLNetLMHeadModel, config)
    prepared = prepare(model)
    assert prepared.kind == "encoder" and [fallback.node for fallback in prepared.fallbacks] == ["generation"]
    given = {"input_ids": torch.arange(3, 30).reshape(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    given["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        found, expected = captured(prepared).module(**given), model(**given)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected.logits)
