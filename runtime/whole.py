"""Graphs without a cache: every run computes the whole text, whatever was computed of it before.

A text shorter than the graph takes is filled up behind its end. What it is filled with changes nothing before it: such a
graph is causal, or has a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler.errors import InputError, UnsupportedError, UsageError
from qcompiler.runtime.artifact import Artifact, TensorInfo

# Arrays by name in, arrays by name out.
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

_NOTHING = np.empty(0, np.int64)


class WholeText:
    """A decoder without a cache, or an encoder-decoder: what `Session` needs of a decoder (see `Decoder`).

    Attributes:
        length: tokens of the text so far; of an encoder-decoder those of the decoder's.
        source: the text that an encoder-decoder's encoder reads, int64 [n]; None before there is one.
    """

    step: int | None = None

    def __init__(self, artifact: Artifact, run: Run) -> None:
        logits = [info for info in artifact.outputs if info.role == "logits"]
        if not logits or not isinstance(logits[0].shape[-1], int):
            raise InputError(f"{artifact.path}: no output with the role `logits` and a fixed last axis")
        self._artifact, self._run, self._logits = artifact, run, logits[0]
        self.vocabulary = int(logits[0].shape[-1])
        self._own = "decoder_tokens" if artifact.kind == "encoder-decoder" else "tokens"
        for role in {"tokens", self._own}:
            if artifact.input(role) is None:
                raise InputError(f"{artifact.path}: no input of the role `{role}`")
        for info in artifact.inputs:
            if info.role not in ("tokens", "decoder_tokens", "mask", "positions", "token_types", "logits_to_keep"):
                raise UnsupportedError(f"{artifact.path}: nothing is known to feed to the input {info.name!r} {list(info.shape)}")
        self.source: np.ndarray | None = None
        self._text = _NOTHING

    @property
    def length(self) -> int:
        return len(self._text)

    def reset(self) -> None:
        """Forget the text; what the encoder has read stays."""
        self._text = _NOTHING

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Append `tokens` [n] int64; the logits of the last `keep` of them, float32 [keep, vocabulary]."""
        text = np.concatenate([self._text, tokens])
        filler = max(self._artifact.shortest - len(text), 0)
        feeds = {info.name: self._feed(info, text, keep + filler) for info in self._artifact.inputs}
        logits = self._run(feeds)[self._logits.name][0]
        self._text = text
        return logits[: len(logits) - filler][-keep:].astype(np.float32, copy=False)

    def _feed(self, info: TensorInfo, text: np.ndarray, keep: int) -> np.ndarray:
        if info.role == "logits_to_keep":
            return np.array([keep], info.dtype)
        if info.role != self._own and self._own != "tokens":
            if self.source is None:
                raise UsageError(f"{self._artifact.path} has no text for its encoder yet: give it one with read()")
            text = self.source
        size = max(len(text), self._artifact.shortest)
        if info.role in ("tokens", "decoder_tokens"):
            return np.pad(text, (0, size - len(text))).reshape(1, -1).astype(info.dtype)
        if info.role == "mask":
            return (np.arange(size) < len(text)).reshape(1, -1).astype(info.dtype)
        if info.role == "positions":
            lead = [dim if isinstance(dim, int) else 1 for dim in info.shape[:-1]]
            return np.broadcast_to(np.arange(size, dtype=info.dtype), [*lead, size]).copy()
        return np.zeros((1, size), info.dtype)
