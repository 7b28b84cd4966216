"""Tokenizers as evaluation and calibration need them: text to ids, and the special tokens around a sequence."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.errors import InputError

# Tokenizers without a limit state an absurdly large one.
_NO_LIMIT = 10**9


class Tokens:
    """A `tokenizers.Tokenizer` or a tokenizer of `transformers`, behind one face.

    Attributes:
        name: where it comes from, for messages.
        limit: the longest sequence that the tokenizer states, or None.
    """

    def __init__(self, tokenizer: Any, name: str, limit: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.limit = limit if limit is not None and limit < _NO_LIMIT else None

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text` as int64 `[n]`, without the special tokens that mark a sequence."""
        return np.array(self._ids(text, special=False), dtype=np.int64)

    @cached_property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        tokenizer = self._tokenizer
        return len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts before a sequence: usually one that begins a text, or none."""
        return self._marks[0]

    @property
    def suffix(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts after a sequence."""
        return self._marks[1]

    @cached_property
    def _marks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # A word, not the empty text, tells what stands before from what stands after.
        word, marked = self._ids("a", special=False), self._ids("a", special=True)
        for start in range(len(marked) - len(word) + 1):
            if word and marked[start : start + len(word)] == word:
                return tuple(marked[:start]), tuple(marked[start + len(word) :])
        return (), ()

    def _ids(self, text: str, special: bool) -> list[int]:
        found = self._tokenizer.encode(text, add_special_tokens=special)
        return list(getattr(found, "ids", found))


def load_tokens(source: Any) -> Tokens:
    """The tokenizer of a model directory or hub id, or `source` itself when it is one already.

    A `tokenizer.json` is read with `tokenizers` alone; anything else needs `transformers`.

    Raises:
        InputError: there is no tokenizer, or it cannot be read.
    """
    if isinstance(source, Tokens):
        return source
    if not isinstance(source, str | os.PathLike):
        return Tokens(source, type(source).__name__, getattr(source, "model_max_length", None))
    directory = Path(source)
    file = directory / "tokenizer.json"
    if file.is_file():
        import tokenizers

        try:
            # `tokenizers` reports everything as a plain Exception.
            return Tokens(tokenizers.Tokenizer.from_file(str(file)), str(source), _stated_limit(directory))
        except Exception as error:
            raise InputError(f"cannot read the tokenizer {str(file)!r}: {error}") from error
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except ImportError as error:
        raise InputError(f"{str(source)!r} has no tokenizer.json; other tokenizers need transformers") from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"there is no tokenizer at {str(source)!r}: {str(error).splitlines()[0]}") from error
    return Tokens(tokenizer, str(source), getattr(tokenizer, "model_max_length", None))


def same_tokens(one: Tokens, other: Tokens, text: str) -> bool:
    """Whether both tokenizers turn `text` into the same ids."""
    return one is other or (
        one.prefix == other.prefix
        and one.suffix == other.suffix
        and np.array_equal(one.encode(text), other.encode(text))
    )


def sequence(prefix: Sequence[int], ids: np.ndarray, suffix: Sequence[int] = ()) -> np.ndarray:
    """`prefix`, `ids` and `suffix` in one int64 array."""
    return np.concatenate([np.array(prefix, np.int64), ids, np.array(suffix, np.int64)])


def _stated_limit(directory: Path) -> int | None:
    try:
        stated = json.loads((directory / "tokenizer_config.json").read_bytes()).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        return None  # the file is optional, and so is what it says
    return int(stated) if isinstance(stated, int | float) and 0 < stated < _NO_LIMIT else None
