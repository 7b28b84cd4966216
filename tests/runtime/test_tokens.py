"""Tokens: ids as the tokenizer gives them, and text that streams to exactly what decoding everything gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from qcompiler.errors import InputError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.tokens import Tokenizer, has_tokenizer
from tests.artifacts import REFERENCE, scratch, write_manifest

TEXTS = ["def main():\n    return 0\n", "naïve café — 東京 🎉👩‍👩‍👧", "", " leading", "a" * 300, "\x00\x7f\u200b"]


def artifact_with(tokenizer: str | None):
    folder = scratch()
    (folder / "model.onnx").write_bytes(b"")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    return open_artifact(write_manifest(folder, {"tokens": {"bos": 0, "eos": [0], "pad": None}}))


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    return Tokenizer(artifact_with((REFERENCE / "tokenizer.json").read_text()))


def spelled_by_bytes() -> Tokenizer:
    """A vocabulary of a few words and all bytes, as sentencepiece models have: a leading space is dropped."""
    vocabulary = {"<s>": 0, "▁": 1, "▁he": 2, "llo": 3, "▁world": 4, "é": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    return Tokenizer(artifact_with(tokenizer.to_str()))


def streamed(tokenizer: Tokenizer, ids: list[int], special: bool = False) -> str:
    stream = tokenizer.stream(special=special)
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in tokenizer.decode(ids, special=special)
    return "".join(pieces) + stream.finish()


def test_ids_are_those_of_transformers(reference: Tokenizer) -> None:
    expected = AutoTokenizer.from_pretrained(REFERENCE)
    for text in TEXTS:
        ids = reference.encode(text)
        assert ids == expected(text)["input_ids"]
        assert reference.decode(ids) == text
    assert reference.id("<|endoftext|>") == reference.bos == 0 and reference.eos == (0,)
    assert reference.id("no such token") is None and reference.size == 4096


def test_special_tokens_are_added_as_the_tokenizer_does() -> None:
    tokenizer = spelled_by_bytes()
    assert tokenizer.encode("é")[0] == 0 and 0 not in tokenizer.encode("é", special=False)
    # Neither cut nor filled up, whatever the tokenizer's file asks for.
    assert len(tokenizer.encode("x y z x y z")) > 6
    assert tokenizer.decode([0, 2, 3]) == "hello" and tokenizer.decode([0, 2, 3], special=True).startswith("<s>")


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(reference: Tokenizer, text: str) -> None:
    assert streamed(reference, reference.encode(text)) == text


def test_only_complete_characters_are_given_out(reference: Tokenizer) -> None:
    stream, text = reference.stream(), ""
    for token in reference.encode("東京🎉!"):
        text += stream.push(token)
        assert "東京🎉!".startswith(text)
    assert text == "東京🎉!" and stream.finish() == ""


@pytest.mark.parametrize("seed", range(40))
def test_any_ids_stream_to_what_they_decode_to(reference: Tokenizer, seed: int) -> None:
    """Random ids: broken characters, special tokens, longer than the window."""
    random = np.random.default_rng(seed)
    # The first 260 ids are mostly single bytes, so that characters break everywhere.
    ids = random.integers(0, 260 if seed % 2 else reference.size, 200).tolist()
    assert streamed(reference, ids) == reference.decode(ids)
    assert streamed(reference, ids, special=True) == reference.decode(ids, special=True)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_that_spell_characters_stream_exactly(seed: int) -> None:
    tokenizer = spelled_by_bytes()
    random = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < 200:
        kind = random.integers(4)
        if kind == 0:
            ids.append(int(random.integers(0, 6)))
        elif kind == 1:
            ids.extend(6 + byte for byte in "é東🎉"[int(random.integers(3))].encode())
        elif kind == 2:
            ids.append(int(random.integers(6, 262)))
        else:
            ids.extend([1, 2, 3])
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_no_tokenizer_or_a_broken_one(tmp_path: Path) -> None:
    artifact = artifact_with(None)
    assert not has_tokenizer(artifact)
    with pytest.raises(InputError, match="without a tokenizer; pass token ids"):
        Tokenizer(artifact)
    with pytest.raises(InputError, match="tokenizer.json cannot be read as a tokenizer"):
        Tokenizer(artifact_with("{}"))
