"""Cutting a text into windows, and how long a window is.

The window of a model is the context that it was trained at, where that is known: the key `training_context` in its
`config.json` (kept by `transformers` on load and save, and copied into artifacts). Positions may reach further than
training did, and there a perplexity measures the model's ignorance and not the quantization. Without the key it is the
number of positions. Neither beyond 2048, the length that published figures use; 512 where nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.evaluate.tokens import sequence

TRAINING_CONTEXT = "training_context"
LONGEST_DEFAULT = 2048
UNKNOWN_DEFAULT = 512

# What configurations call the number of positions.
_POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length", "context_length",
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What is known of a model's context.

    Attributes:
        trained: tokens that it was trained at, or None.
        positions: the most tokens that it can take, or None.
    """

    trained: int | None = None
    positions: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | Any) -> Context:
        """Read from a `config.json` as a mapping, or from a configuration object of `transformers`."""
        values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
        if isinstance(values.get("text_config"), Mapping):
            values = {**values, **values["text_config"]}
        return cls(
            _count(values.get(TRAINING_CONTEXT)), next(filter(None, (_count(values.get(k)) for k in _POSITIONS)), None)
        )

    def within(self, limit: int | None) -> Context:
        """The same where something else (a tokenizer, a cache) takes no more than `limit` tokens."""
        if limit is None:
            return self
        return Context(self.trained, limit if self.positions is None else min(limit, self.positions))

    def shorter(self, count: int) -> Context:
        """The same where `count` positions are taken by something else."""
        return Context(self.trained, None if self.positions is None else max(self.positions - count, 2))

    @property
    def default(self) -> int | None:
        """Length of a window, or None where nothing is known."""
        known = [n for n in (self.trained, self.positions) if n is not None]
        return min(*known, LONGEST_DEFAULT) if known else None


def choose_context(asked: int | None, models: Sequence[Context]) -> int:
    """Tokens a window: what was asked for, else the shortest default of the models.

    Raises:
        UsageError: fewer than 2 tokens, or more than a model can take.
    """
    if asked is None:
        return min((m.default for m in models if m.default is not None), default=UNKNOWN_DEFAULT)
    most = min((m.positions for m in models if m.positions is not None), default=None)
    if asked < 2 or (most is not None and asked > most):
        bound = "at least 2" if most is None else f"2 to {most}, which is what the model can take"
        raise UsageError(f"context is {asked}, expected {bound}")
    return asked


@dataclass(frozen=True)
class Window:
    """One sequence to run.

    Attributes:
        index: 0, 1, 2 …
        tokens: int64 `[length]`, with the prefix and suffix of the tokenizer.
        first, last: `tokens[first:last]` are scored, each predicted by the logits one position before it.
        start: where in the text's ids the window begins.
    """

    index: int
    tokens: np.ndarray
    first: int
    last: int
    start: int

    @property
    def labels(self) -> np.ndarray:
        """The scored tokens, int64 `[last - first]`."""
        return self.tokens[self.first : self.last]

    def scored(self, logits: np.ndarray) -> np.ndarray:
        """The rows of `logits` `[length, vocabulary]` that predict `labels`."""
        return logits[self.first - 1 : self.last - 1]


def cut(
    ids: np.ndarray, context: int, stride: int | None = None, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> Iterator[Window]:
    """Windows of `context` tokens over `ids` int64 `[n]`, one every `stride` tokens, the last one perhaps shorter.

    Without a stride windows do not overlap. With one, a window scores only what no earlier window has scored, so every
    token is scored once, with at least `context - stride` tokens before it. A token with nothing before it cannot be
    scored: the first of the text and, without overlap and without a prefix, the first of every window.

    Raises:
        UsageError: the stride is not in 1 to `context`, or prefix and suffix leave no room.
    """
    size = context - len(prefix) - len(suffix)
    if size < 1:
        raise UsageError(f"context is {context}, expected more than the {context - size} special tokens of a sequence")
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"stride is {stride}, expected 1 to {context}, the context")
    step = size if stride is None else min(stride, size)
    return _cut(ids, size, step, prefix, suffix)


def _cut(ids: np.ndarray, size: int, step: int, prefix: Sequence[int], suffix: Sequence[int]) -> Iterator[Window]:
    index = done = start = 0
    while done < len(ids):
        end = min(start + size, len(ids))
        tokens = sequence(prefix, ids[start:end], suffix)
        first, last = max(len(prefix) + done - start, 1), len(tokens) - len(suffix)
        if first < last:
            yield Window(index, tokens, first, last, start)
            index += 1
        done, start = end, start + step


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 1 else None
