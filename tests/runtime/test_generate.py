"""Generation: the same tokens as the model in torch, streamed text, stops, limits, interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.errors import CapacityError, GateError, InputError, UsageError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.bench import bench
from qcompiler.runtime.generate import Generation, generate
from qcompiler.runtime.sampling import Sampler
from qcompiler.runtime.session import Session
from qcompiler.runtime.tokens import Tokenizer
from tests.artifacts import reference_artifact, reference_model, scratch, write_manifest

PROMPT = "Python is a programming language that"


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What transformers generates greedily."""
    with torch.no_grad():
        output = reference_model().generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(reference_artifact(), capacity=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_artifact(reference_artifact()))


def copy_with(changes: dict, drop: tuple[str, ...] = (), files: dict[str, str] | None = None) -> Path:
    """The reference artifact with changes in its manifest, without some files, with others."""
    folder = scratch() / "copy"
    shutil.copytree(reference_artifact(), folder)
    manifest = dict(open_artifact(folder).manifest) | changes
    for name in drop:
        (folder / name).unlink()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    del manifest["files"], manifest["manifest_sha256"]
    return write_manifest(folder, manifest)


@pytest.mark.parametrize("kind", ["shared", "growing"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    generation = generate(Session(reference_artifact(kind), capacity=32), prompt, max_tokens=48)
    assert [token.id for token in generation] == expected_tokens(prompt, 48)
    assert generation.stats.finish == "length"


def test_streamed_text_is_the_text(session: Session, tokenizer: Tokenizer) -> None:
    generation = generate(session, PROMPT, max_tokens=100)
    text = "".join(token.text for token in generation)
    assert text == generation.text == tokenizer.decode(generation.ids)


def test_end_tokens_stop(session: Session, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    greedy = [token.id for token in generate(session, prompt, max_tokens=12)]
    at = greedy.index(greedy[5])
    for path in (
        copy_with({"tokens": {"bos": 0, "eos": [7, greedy[5]], "pad": None}}),
        copy_with({}, files={"generation_config.json": json.dumps({"eos_token_id": [greedy[5], 9]})}),
        copy_with({}, files={"generation_config.json": json.dumps({"eos_token_id": greedy[5]})}),
    ):
        generation = generate(Session(path), prompt, max_tokens=12)
        tokens = list(generation)
        assert [token.id for token in tokens] == greedy[: at + 1]
        assert generation.text == tokenizer.decode(greedy[:at])
        assert generation.stats.finish == "eos"


def test_stop_texts_and_ids(session: Session, tokenizer: Tokenizer) -> None:
    whole = generate(session, PROMPT, max_tokens=40)
    list(whole)
    # A text across tokens, of which the beginning alone must not be given out.
    stop = whole.text[21:29]
    generation = generate(session, PROMPT, max_tokens=40, stop=[stop, "never to be seen"])
    pieces = [token.text for token in generation]
    assert "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert generation.stats.finish == "stop"
    by_id = generate(session, PROMPT, max_tokens=40, stop=whole.ids[3])
    assert [token.id for token in by_id] == whole.ids[: whole.ids.index(whole.ids[3]) + 1]
    assert by_id.stats.finish == "stop"
    # Held back as the possible beginning of a stop text, given out at the end.
    held = generate(session, PROMPT, max_tokens=40, stop=whole.text[-3:] + "and more")
    list(held)
    assert held.text == whole.text


def test_the_context_bounds_prompt_and_tokens(session: Session) -> None:
    with pytest.raises(CapacityError, match="1025 positions, but the model's context is 1024: 1 too many"):
        generate(session, [5] * 1000, max_tokens=25)
    with pytest.raises(CapacityError):
        generate(session, [5] * 1024)
    generation = generate(session, [5] * 1020, stop=())
    assert len(list(generation)) <= 4


def test_an_interrupted_generation_leaves_the_session_usable(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [token.id for token in generate(session, PROMPT, max_tokens=10)]
    real, calls = session.decoder.run, []

    def interrupted(tokens: np.ndarray, keep: int) -> np.ndarray:
        calls.append(1)
        result = real(tokens, keep)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(session.decoder, "run", interrupted)
    generation = generate(session, PROMPT, max_tokens=10)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert generation.ids == whole[:3] and generation.stats.finish == "interrupted"
    assert list(generation) == []
    monkeypatch.undo()
    assert [token.id for token in generate(session, PROMPT, max_tokens=10)] == whole


def test_a_closed_generation_stops(session: Session) -> None:
    generation = generate(session, PROMPT, max_tokens=10)
    next(generation)
    generation.close()
    assert generation.stats.finish == "interrupted" and generation.stats.tokens == 1


def test_a_text_is_continued_in_the_same_cache(session: Session, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    first = generate(session, prompt, max_tokens=5)
    list(first)
    again = generate(session, [first.ids[-1], 17, 18], max_tokens=5, reset=False)
    assert [token.id for token in again] == expected_tokens([*prompt, *first.ids, 17, 18], 5)


def test_sampling_follows_its_seed(session: Session) -> None:
    def draw(seed: int) -> list[int]:
        options = dict(max_tokens=12, temperature=1.2, top_k=50, top_p=0.95)
        return [token.id for token in generate(session, PROMPT, seed=seed, **options)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_samples_have_the_models_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for options, expected in (
        (dict(), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.7), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.5), [1, 0, 0, 0]),
        (dict(top_k=3, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ):
        sampler = Sampler(temperature=1.0, seed=3, **options)
        counts = np.bincount([sampler(logits) for _ in range(8000)], minlength=4) / 8000
        np.testing.assert_allclose(counts, expected, atol=0.02)
    assert Sampler()(logits) == 0
    cold = Sampler(temperature=1e-4, seed=0)
    assert {cold(logits) for _ in range(50)} == {0}


def test_unusable_options_and_logits_are_refused(session: Session) -> None:
    for options in (
        dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5),
        dict(max_tokens=0), dict(stop=""),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            generate(session, PROMPT, **options)
    with pytest.raises(InputError, match="no tokens"):
        generate(session, "")
    with pytest.raises(GateError, match="NaN"):
        Sampler()(np.array([0, np.nan], np.float32))


def test_without_a_tokenizer_token_ids_are_needed() -> None:
    session = Session(copy_with({}, drop=("tokenizer.json", "generation_config.json")))
    with pytest.raises(InputError, match="pass token ids"):
        generate(session, PROMPT)
    with pytest.raises(InputError, match="cannot stop at"):
        generate(session, [1, 2], stop="x")
    tokens = list(generate(session, [11, 12, 13], max_tokens=4))
    assert [token.id for token in tokens] == expected_tokens([11, 12, 13], 4)
    assert {token.text for token in tokens} == {""}


def test_an_unknown_context_needs_a_limit() -> None:
    session = Session(copy_with({"context": None}))
    with pytest.raises(UsageError, match="max_tokens"):
        generate(session, [1])
    assert len(list(generate(session, [1], max_tokens=3))) <= 3


def test_stats_count_what_was_run(session: Session) -> None:
    generation: Generation = generate(session, [1, 2, 3], max_tokens=6)
    list(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.tokens, stats.steps) == (3, 6, 5)
    assert stats.prefill_tokens_per_second > 0 and stats.decode_tokens_per_second > 0


def test_bench_measures_and_says_what() -> None:
    result = bench(reference_artifact(), prompt_tokens=2000, new_tokens=4, repeats=2, threads=1)
    assert result["prompt_tokens"] == 1020 and result["cache"] == "shared"
    assert len(result["decode_tokens_per_second"]["samples"]) == 2
    assert result["peak_rss_bytes"] > 0 and result["load_seconds"] > 0
    with pytest.raises(UsageError, match="repeats is 0"):
        bench(reference_artifact(), repeats=0)
