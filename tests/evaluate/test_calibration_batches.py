from __future__ import annotations

import numpy as np
import pytest

from qcompiler.data import reference_model
from qcompiler.errors import InputError, UsageError
from qcompiler.evaluate import Text, calibration_batches, calibration_text
from qcompiler.evaluate.tokens import Tokens, load_tokens


class Letters:
    """A tokenizer of one token a character; 1 begins a text and 2 ends it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(c) for c in text]
        return [1, *ids, 2] if add_special_tokens else ids

    def __len__(self) -> int:
        return 128


class Warnings:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def test_windows_of_the_calibration_text():
    batches = calibration_batches(reference_model(), samples=16, length=256, seed=3)
    again = calibration_batches(load_tokens(reference_model()), samples=16, length=256, seed=3)
    other = calibration_batches(reference_model(), samples=16, length=256, seed=4)
    assert len(batches) == 16 and all(b.shape == (256,) and b.dtype == np.int64 for b in batches)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert any((a != b).any() for a, b in zip(batches, other, strict=True))
    ids = load_tokens(reference_model()).encode(calibration_text().content)
    rows = {tuple(row) for row in ids[: len(ids) // 256 * 256].reshape(-1, 256)}
    assert {tuple(b) for b in batches} <= rows and len({tuple(b) for b in batches}) == 16


def test_the_tokenizers_beginning_is_kept():
    batches = calibration_batches(Letters(), Text("abcdefgh", "letters"), samples=9, length=4)
    assert [b.tolist() for b in batches] == [[1, 97, 98, 99], [1, 100, 101, 102]]


def test_a_short_text_is_said():
    reporter = Warnings()
    batches = calibration_batches(Letters(), Text("abcdefgh", "letters"), samples=9, length=3, reporter=reporter)
    assert len(batches) == 4
    assert reporter.warnings == ["calibration: letters gives 4 windows of 3 tokens, 9 were asked for; all 4 are used"]
    with pytest.raises(InputError, match="letters has 8 tokens, expected at least 63"):
        calibration_batches(Letters(), Text("abcdefgh", "letters"), samples=9, length=64)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}])
def test_bad_numbers(wrong):
    with pytest.raises(UsageError):
        calibration_batches(Letters(), Text("abc", ""), **{"samples": 1, "length": 3, **wrong})


def test_marks_of_a_tokenizer():
    tokens = Tokens(Letters(), "letters", limit=10**30)
    assert (tokens.prefix, tokens.suffix, tokens.size, tokens.limit) == ((1,), (2,), 128, None)
    reference = load_tokens(reference_model())
    assert (reference.prefix, reference.suffix, reference.size, reference.limit) == ((), (), 4096, None)


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at"):
        load_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokens(tmp_path)
