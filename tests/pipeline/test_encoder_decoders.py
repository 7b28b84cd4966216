"""Encoder-decoders as a whole: one graph of both texts, from capture to a session that answers."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.capture.feeds import feed
from qcompiler.capture.prepare import prepare
from qcompiler.errors import CapacityError, InputError, UnsupportedError, UsageError
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.recipe import Allow
from qcompiler.runtime.bench import bench
from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session
from tests.captures import ANALYSE, NORMALISE, Analysed, captured, relative_error, run
from tests.pipeline.rewire import float_artifact
from tests.pipeline.test_architectures import FakeQuantized

VOCABULARY = 96
BART = dict(
    vocab_size=VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2, forced_bos_token_id=0, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0, relative_attention_max_distance=20,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", dict(BART, decoder_start_token_id=1, forced_bos_token_id=None, bad_words_ids=[[1]])),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "m2m_100": ("M2M100ForConditionalGeneration", BART),
    "pegasus": ("PegasusForConditionalGeneration", BART),
}
EVERY = [name if name == "bart" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
RECIPE = replace(recipes.load("int4-weights"), allow=Allow(min_coverage=0))


@functools.cache
def made(name: str) -> Analysed:
    class_name, options = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    prepared = prepare(model)
    graph = captured(prepared)
    return Analysed(model, prepared, graph, run(graph, NORMALISE) | run(graph, ANALYSE), {})


@functools.cache
def compiled(folder: Path, name: str, target: str) -> qcompiler.CompileResult:
    return qcompiler.compile(made(name).model, output=folder / f"{name}-{target}", recipe=RECIPE, target=target, samples=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", EVERY)
def test_the_graph_computes_both_texts_at_every_length(name: str) -> None:
    case = made(name)
    assert (case.prepared.kind, case.prepared.start) == ("encoder-decoder", MODELS[name][1]["decoder_start_token_id"])
    for source, target in ((1, 1), (2, 9), (23, 1), (40, 30), (9, 50)):
        ids, begin = texts(source, target)
        mask = torch.ones_like(ids)
        mask[:, source - source // 3 :] = 0
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": begin}
        with torch.no_grad():
            expected, found = case.model(**given, use_cache=False).logits, case.graph.module(**given).logits
        assert relative_error({"x": found}, {"x": expected}) < 1e-5


def test_samples_are_the_text_on_both_sides_shifted_by_the_start() -> None:
    prepared = made("bart").prepared
    (tokens,) = texts(6)
    given = feed(prepared, tokens)
    assert torch.equal(given["decoder_input_ids"], torch.cat([torch.tensor([[2]]), tokens[:, :-1]], 1))
    assert torch.equal(given["input_ids"], tokens) and given["attention_mask"].all()


@pytest.mark.parametrize("name", EVERY)
def test_a_session_computes_what_the_fake_quantized_graph_computes(name: str, folder: Path, tmp_path: Path) -> None:
    case, result = made(name), compiled(folder, name, "onnx")
    assert (result.manifest["kind"], result.manifest["cache"]) == ("encoder-decoder", None)
    roles = [port["role"] for port in result.manifest["inputs"]]
    assert roles == ["tokens", "mask", "decoder_tokens", "logits_to_keep"]
    context = result.quantizer.context
    fake = FakeQuantized(case, context.solutions, context.schemes, True)
    ids, begin = texts(13, 9)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(fake.run(ids, mask, begin))[0][0].numpy()
    bound = 1e-4 * np.abs(expected).max()
    session = Session(float_artifact(result.path, tmp_path / "float"), threads=1)
    source, target = ids[0].numpy(), begin[0].numpy()
    for _ in range(2):  # the second time the encoder reads anew
        session.read(source)
        found = [session.prefill(target[:4]), *(session.step(int(token)) for token in target[4:])]
        np.testing.assert_allclose(np.stack(found), expected[3:], atol=bound)
    np.testing.assert_allclose(session.logits(target), expected, atol=bound)
    # By name, the text filled up: what a mask of zeros covers changes nothing.
    filled = {"input_ids": np.pad(ids.numpy(), ((0, 0), (0, 4)), constant_values=7)}
    filled["attention_mask"] = (np.arange(17) < 13)[None]
    np.testing.assert_allclose(session.run(decoder_input_ids=begin.numpy(), **filled)["logits"][0], expected, atol=bound)


@pytest.mark.parametrize("name", EVERY)
def test_generation_is_the_models_own_greedy_text(name: str, folder: Path) -> None:
    """Weights as they are dequantized, put into the model: then transformers' own generation picks the same tokens."""
    result = compiled(folder, name, "onnx")
    model = copy.deepcopy(made(name).model)
    with torch.no_grad():
        for site, solution in result.quantizer.context.solutions.items():
            model.get_submodule(site).weight.copy_(solution.dequantize())
    (source,) = texts(11)
    with torch.no_grad():
        expected = model.generate(source, max_new_tokens=12, do_sample=False)[0].tolist()
    generation = generate(Session(result.path, threads=1), source[0].numpy(), max_tokens=12)
    found = [token.id for token in generation]
    begun = list(result.manifest["tokens"]["decoder_start"])
    assert begun + found[: len(expected) - len(begun)] == expected
    assert generation.stats.prompt_tokens == 11


def test_a_text_may_begin_with_tokens_of_the_users_choice(folder: Path) -> None:
    session = Session(compiled(folder, "bart", "onnx").path, threads=1)
    source = np.arange(5, 14)
    found = [token.id for token in generate(session, source, max_tokens=3, begin=[7, 8])]
    session.read(source)
    assert found[0] == int(np.argmax(session.prefill([2, 7, 8])))


@pytest.mark.slow
def test_the_torch_target_computes_the_same(folder: Path) -> None:
    logits = []
    for target in ("onnx", "torch"):
        session = Session(compiled(folder, "t5", target).path, threads=1)
        session.read(np.arange(5, 14))
        logits.append([session.prefill([0, 8, 9]), session.step(4)])
    np.testing.assert_allclose(*logits, atol=1e-4 * np.abs(logits[0]).max())


def test_what_a_session_cannot_do_is_said(folder: Path) -> None:
    session = Session(compiled(folder, "bart", "onnx").path, threads=1)
    with pytest.raises(UsageError, match="has no text for its encoder yet: give it one with read"):
        session.prefill([2])
    with pytest.raises(CapacityError, match="the model's context is 64"):
        session.read(np.full(65, 5))
    with pytest.raises(InputError, match="outside the vocabulary"):
        session.read([VOCABULARY])


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


def test_evaluation_scores_the_text_that_both_sides_see(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    result = compiled(folder, "bart", "onnx")
    session, model = Session(result.path, threads=1), made("bart").model
    found = evaluate(session, model, text=[text], context=32, tokenizer=Letters())
    assert found["kind"] == "language-model" and found["same_top"] > 0.5
    ids = torch.tensor([Letters().encode(text.read_text())[:32]])
    begin = torch.cat([torch.tensor([[2]]), ids], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=begin).logits[0, 1:-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    alone = evaluate(model, text=[text], context=32, tokenizer=Letters(), max_windows=1)
    assert alone["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)


def test_bench_reads_a_prompt_and_writes_tokens(folder: Path) -> None:
    result = bench(compiled(folder, "bart", "onnx").path, prompt_tokens=8, new_tokens=3, repeats=1, threads=1)
    assert result["prompt_tokens"] == 8 and result["decode_tokens_per_second"]["samples"]


def test_one_without_a_head_gives_its_decoders_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(**BART)).eval()
    result = qcompiler.compile(model, output=tmp_path / "out", recipe=RECIPE, samples=0)
    session = Session(result.path, threads=1)
    ids, begin = texts(9, 5)
    (states,) = session.run(input_ids=ids.numpy(), decoder_input_ids=begin.numpy()).values()
    assert states.shape == (1, 5, 64)
    with pytest.raises(UsageError, match="'encoder-decoder', not a decoder: use run"):
        session.read(ids[0].numpy())


class Asking(transformers.BartForConditionalGeneration):
    """Looks for padding among the decoder's tokens where it is not told which of them count."""

    def forward(self, input_ids=None, decoder_input_ids=None, decoder_attention_mask=None, **kwargs):
        if decoder_attention_mask is None and (decoder_input_ids == self.config.pad_token_id).any():
            decoder_attention_mask = (decoder_input_ids != self.config.pad_token_id).long()
        return super().forward(
            input_ids, decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs
        )


def test_a_model_that_looks_for_padding_is_told_that_every_token_counts() -> None:
    torch.manual_seed(0)
    model = Asking(transformers.BartConfig(**BART)).eval()
    ids, begin = texts(9, 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": begin}
    with torch.no_grad():
        found, expected = captured(prepare(model)).module(**given).logits, model(**given).logits
    assert relative_error({"x": found}, {"x": expected}) < 1e-5


class Switching(transformers.BartForConditionalGeneration):
    """Computes short texts in another way than long ones, and goes on so once it has seen a short one."""

    short = False

    def forward(self, input_ids=None, decoder_input_ids=None, **kwargs):
        # The text itself is not given again with what the encoder made of it.
        self.short = self.short or input_ids is None or input_ids.shape[1] <= 30
        output = super().forward(input_ids, decoder_input_ids=decoder_input_ids, **kwargs)
        return output if self.short else type(output)(logits=-output.logits)


class Untouched(ExportQuantizer):
    quantizes_fx_graph = True
    supported_formats = (ExportFormat.DYNAMO,)

    def quantize(self, model, sample_inputs, export_format):
        return model


def test_a_model_that_switches_over_is_right_for_the_texts_that_were_traced_alone() -> None:
    torch.manual_seed(0)
    model = Switching(transformers.BartConfig(**BART)).eval()
    prepared = prepare(model)
    assert not model.short
    prepared.export_torch(Untouched())
    assert prepared.longest == 30


class Otherwise(transformers.BartForConditionalGeneration):
    """Generates from another text than it is given."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        found = super().prepare_inputs_for_generation(*args, **kwargs)
        return found | {"decoder_input_ids": found["decoder_input_ids"] + 3}


def test_a_model_that_generates_from_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="bart: it generates from more than two texts"):
        prepare(Otherwise(transformers.BartConfig(**BART)))
