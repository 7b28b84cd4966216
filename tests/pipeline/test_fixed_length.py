"""Models whose own code holds the length of a text, or the batch: a graph of one length, where the recipe allows it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.capture.dimensions import program_ports
from qcompiler.capture.feeds import feed
from qcompiler.capture.fixed import fixed_length
from qcompiler.capture.prepare import prepare
from qcompiler.errors import CapacityError, GateError, UnsupportedError, UsageError
from qcompiler.evaluate.evaluation import evaluate
from qcompiler.recipe import Allow
from qcompiler.report.compiled import form_lines
from qcompiler.runtime.generate import generate
from qcompiler.runtime.session import Session

VOCABULARY, LENGTH = 96, 12
RECIPE = replace(recipes.load("int8-weights"), allow=Allow(min_coverage=0, fixed_length=LENGTH))
BERT = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=1,
    max_position_embeddings=24,
)  # fmt: skip


class Loop(transformers.OpenAIGPTLMHeadModel):
    """What was there before every token goes into it by a loop over the tokens."""

    def forward(self, input_ids=None, **kwargs):
        embedded = self.transformer.tokens_embed(input_ids)
        state, states = torch.zeros_like(embedded[:, 0]), []
        for at in range(input_ids.shape[1]):
            state = 0.5 * state + embedded[:, at]
            states.append(state)
        return super().forward(inputs_embeds=torch.stack(states, 1), **kwargs)


class Backwards(Loop):
    """Every token is seen together with the last one."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(torch.cat([input_ids[:, :1], (input_ids + input_ids[:, -1:])[:, 1:] % VOCABULARY], 1), **kwargs)


class Listed(transformers.BertModel):
    """Its positions are a list of Python numbers."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        positions = torch.tensor(list(range(input_ids.shape[1])))[None]
        return super().forward(input_ids, attention_mask, position_ids=positions, **kwargs)


class Folded(Listed):
    """What it adds to every token is the mean of all, the filling among them."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output


class OneByOne(transformers.BertModel):
    """Takes the texts of a batch one by one."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        forward = super().forward
        texts = [forward(input_ids[i : i + 1], attention_mask[i : i + 1], **kwargs) for i in range(input_ids.shape[0])]
        texts[0].last_hidden_state = torch.cat([text.last_hidden_state for text in texts])
        texts[0].pooler_output = torch.cat([text.pooler_output for text in texts])
        return texts[0]


@functools.cache
def build(cls) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if issubclass(cls, transformers.BertModel):
        return cls(transformers.BertConfig(**BERT)).eval()
    return cls(transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=24)).eval()


def compiled(cls, output: Path, **allow) -> qcompiler.CompileResult:
    recipe = replace(RECIPE, allow=replace(RECIPE.allow, **allow))
    return qcompiler.compile(build(cls), output=output, recipe=recipe, samples=0)


def text(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def close(found: np.ndarray, expected: torch.Tensor) -> bool:
    """As near as eight bits a weight come."""
    assert found.shape == tuple(expected.shape)
    return bool(np.abs(found - expected.numpy()).max() < 0.02 * expected.abs().max().item())


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


@pytest.fixture
def words(tmp_path: Path) -> list[Path]:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. ")
    return [tmp_path / "text"]


def test_without_leave_it_is_refused_and_told_what_to_allow() -> None:
    prepared = prepare(build(Listed))
    with pytest.raises(UnsupportedError, match=r"holds the length of input_ids at \d+, .*allow: \{fixed_length: N\}"):
        program_ports(prepared.export_torch(), prepared)


def test_a_decoder_computes_texts_up_to_its_one_length(tmp_path: Path, words) -> None:
    model, result = build(Loop), compiled(Loop, tmp_path / "out")
    manifest = result.manifest
    assert manifest["fixed_length"] == {"tokens": LENGTH, "filler": 0, "outputs": {"logits": 1}, "exact": True}
    assert (manifest["shortest"], manifest["longest"], manifest["fallbacks"]) == (LENGTH, LENGTH, [])
    assert manifest["allowed"]["fixed_length"] == LENGTH
    assert any(f"{LENGTH} tokens, one length; shorter texts are filled up" in line for line in form_lines(manifest))
    notes = result.quantizer.trace.entries[0].record["notes"]["notes"]
    assert any("a loop over the tokens is unrolled" in note for note in notes)
    session = Session(result.path, threads=1)
    for length in (1, 5, LENGTH):
        with torch.no_grad():
            expected = model(input_ids=text(length)).logits[0]
        assert close(session.logits(text(length)[0].numpy()), expected)
    generation = generate(session, [5, 9, 17])
    assert len(list(generation)) == LENGTH - 3 and generation.stats.finish == "length"
    with pytest.raises(CapacityError, match=f"{LENGTH + 1} tokens are more than the {LENGTH} .* its graph has one length"):
        session.logits(text(LENGTH + 1)[0].numpy())
    measured = evaluate(session, model, text=words, tokenizer=Letters())
    assert measured["context"] == LENGTH and measured["windows"] > 2 and measured["same_top"] > 0.9


def test_an_encoder_is_filled_up_and_what_comes_of_it_cut_off(tmp_path: Path, words) -> None:
    model, result = build(Listed), compiled(Listed, tmp_path / "out")
    assert result.manifest["fixed_length"] == {"tokens": LENGTH, "filler": 1, "outputs": {"last_hidden_state": 1}, "exact": True}
    session = Session(result.path, threads=1)
    for length in (2, LENGTH):
        ids = torch.cat([text(length), text(length).flip(1), text(length)])
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        found = session.run(input_ids=ids.numpy(), attention_mask=mask.numpy())
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)
        assert all(close(found[name], expected[name]) for name in ("last_hidden_state", "pooler_output"))
    with pytest.raises(CapacityError, match="its graph has one length"):
        session.run(input_ids=text(LENGTH + 1).numpy())
    with pytest.raises(UsageError, match="of different lengths: input_ids 5, attention_mask 4"):
        session.run(input_ids=text(5).numpy(), attention_mask=np.ones((1, 4)))
    # The last window is shorter.
    assert evaluate(session, model, text=words, tokenizer=Letters())["outputs"]["last_hidden_state"]["cosine"] > 0.99


def test_filling_up_that_changes_a_text_is_a_fallback() -> None:
    prepared = prepare(build(Folded), fixed_length=LENGTH)
    assert prepared.fixed is not None and not prepared.fixed.exact
    (fallback,) = prepared.fallbacks
    assert fallback.node == "length" and "filled up and masked" in fallback.reason and "differs by" in fallback.reason


@pytest.mark.slow
def test_a_text_that_filling_up_changes_is_what_the_model_computes_of_it_filled_up(tmp_path: Path, words) -> None:
    with pytest.raises(GateError, match=r"(?s)1 fallbacks, 0 allowed:\n  length: .*differs by .*allow: \{fallbacks: 1\}"):
        compiled(Folded, tmp_path / "out")
    model, result = build(Folded), compiled(Folded, tmp_path / "out", fallbacks=1)
    assert result.manifest["fixed_length"]["exact"] is False
    session = Session(result.path, threads=1)
    ids = torch.nn.functional.pad(text(5), (0, LENGTH - 5), value=BERT["pad_token_id"])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=(torch.arange(LENGTH) < 5).long()[None]).last_hidden_state[:, :5]
    assert close(session.run(input_ids=text(5).numpy())["last_hidden_state"], expected)
    # Only whole windows are the same text to both.
    measured = evaluate(session, model, text=words, tokenizer=Letters())
    assert measured["context"] == LENGTH and measured["tokens"] % LENGTH == 0
    assert measured["outputs"]["last_hidden_state"]["cosine"] > 0.99
    with pytest.raises(UsageError, match=f"windows of {LENGTH} tokens alone .* context is 8"):
        evaluate(session, model, text=words, tokenizer=Letters(), context=8)


def test_a_batch_that_is_held_becomes_one_text_of_any_length() -> None:
    prepared = prepare(build(OneByOne), fixed_length=LENGTH)
    assert prepared.fixed is None and prepared.fallbacks == []
    assert prepared.axes == {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    assert prepared.notes == ["one text at a time: the model's own code holds the batch"]


@pytest.mark.slow
def test_one_text_at_a_time_is_what_the_model_computes_of_it() -> None:
    prepared = prepare(build(OneByOne), fixed_length=LENGTH)
    module = prepared.export_torch().module()
    with torch.no_grad():
        found, expected = (run(**feed(prepared, text(20))) for run in (module, build(OneByOne)))
    torch.testing.assert_close(found["last_hidden_state"], expected["last_hidden_state"])


def test_what_needs_no_fixed_length_gets_none() -> None:
    prepared = prepare(build(transformers.BertModel), fixed_length=LENGTH)
    assert prepared.fixed is None and prepared.notes == [] and prepared.axes["input_ids"] == {0: "batch", 1: "length"}


def test_a_decoder_that_looks_ahead_cannot_be_filled_up() -> None:
    with pytest.raises(UnsupportedError, match="texts shorter than 12 tokens cannot be filled up to it: .* changes their logits"):
        prepare(build(Backwards), fixed_length=LENGTH)


def test_the_length_is_within_the_context_which_true_asks_for() -> None:
    with pytest.raises(UsageError, match="fixed_length: 25.* beyond the model's context of 24"):
        prepare(build(Listed), fixed_length=25)
    assert fixed_length(build(Listed), "listed", True) == 24 and fixed_length(build(Listed), "listed", 8) == 8
    with pytest.raises(UsageError, match="fixed_length is 1, expected at least 2"):
        recipes.load({"name": "one", "linear": {"bits": 8}, "allow": {"fixed_length": 1}})
    loaded = recipes.load({"name": "all", "linear": {"bits": 8}, "allow": {"fixed_length": True}})
    assert loaded.allow.fixed_length is True
