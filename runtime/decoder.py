"""One decoder graph in ONNX Runtime, fed piece by piece: what goes into every input, and no needless copy."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnxruntime

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact, TensorInfo
from qcompiler.runtime.cache import Cache, make_cache

_CACHE_ROLES = ("past_key", "past_value", "past_state")
_FED = ("tokens", "positions", "mask", "token_types", "past_length", "logits_to_keep")


class Decoder(Protocol):
    """What a `Session` needs of whatever runs a decoder (ONNX Runtime here, torch elsewhere)."""

    vocabulary: int
    step: int | None  # see `CacheInfo`

    @property
    def length(self) -> int:
        """Positions that are filled."""

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Append `tokens` [n] int64; the logits of the last `keep` of them, float32 [keep, vocabulary]."""

    def reset(self) -> None:
        """Forget everything."""


class OnnxDecoder:
    """A decoder graph with its cache. Not for several threads at once.

    Single tokens go through one binding that is made once: the arrays behind it are changed in place, so a step costs
    the run and little else.
    """

    def __init__(self, session: onnxruntime.InferenceSession, artifact: Artifact, capacity: int | None = None) -> None:
        if artifact.cache is None:
            raise UnsupportedError(f"{artifact.path} is a decoder without a cache, which cannot generate")
        self._session = session
        self._inputs = [info for info in artifact.inputs if info.role not in _CACHE_ROLES]
        for info in self._inputs:
            if info.role not in _FED:
                raise UnsupportedError(
                    f"{artifact.path}: nothing is known to feed to the input {info.name!r} {list(info.shape)}"
                )
        if artifact.input("tokens") is None:
            raise InputError(f"{artifact.path}: a decoder with no input of the role `tokens`")
        self.step = artifact.cache.step
        logits = [info for info in artifact.outputs if info.role == "logits"]
        if not logits or not isinstance(logits[0].shape[-1], int):
            raise InputError(f"{artifact.path}: no output with the role `logits` and a fixed last axis")
        self._logits = logits[0]
        self.vocabulary = int(logits[0].shape[-1])
        self.cache: Cache = make_cache(artifact, capacity)
        # The binding of single tokens, the arrays behind its inputs and its output; `_stale` when the cache's tensors
        # are others than those it binds.
        self._step = session.io_binding()
        self._feeds = {info.name: self._feed(info, np.zeros(1, np.int64), 1) for info in self._inputs}
        for name, array in self._feeds.items():
            self._step.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        by_role = {info.role: self._feeds[info.name] for info in self._inputs}
        self._token = by_role["tokens"]
        self._lengths = [by_role[role] for role in ("positions", "past_length") if role in by_role]
        self._mask = artifact.input("mask")
        self._step_logits = np.empty((1, 1, self.vocabulary), self._logits.dtype)
        self._step_value = onnxruntime.OrtValue.ortvalue_from_numpy(self._step_logits)
        self._stale = True

    @property
    def length(self) -> int:
        return self.cache.length

    def reset(self) -> None:
        self.cache.reset()
        self._stale = True

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Append `tokens` [n] int64; the logits of the last `keep` of them, float32 [keep, vocabulary]."""
        self._stale |= self.cache.reserve(len(tokens))
        if len(tokens) == 1:
            return self._run_step(tokens)
        return self._run_piece(tokens, keep)

    def _run_piece(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        binding = self._session.io_binding()
        # A binding points into the arrays and does not keep them: they are held here until the run is over.
        feeds = {info.name: self._feed(info, tokens, keep) for info in self._inputs}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        self.cache.bind(binding)
        binding.bind_output(self._logits.name, "cpu")
        self._session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        self._stale = True
        self.cache.commit(binding, len(tokens))
        return logits[0, -keep:].astype(np.float32, copy=False)

    def _run_step(self, tokens: np.ndarray) -> np.ndarray:
        self._token[...] = tokens[0]
        for array in self._lengths:
            array.fill(self.length)
        if self._mask is not None:
            self._feeds[self._mask.name] = self._feed(self._mask, tokens, 1)
            self._step.bind_cpu_input(self._mask.name, self._feeds[self._mask.name])
        if self._stale:
            self._step.clear_binding_outputs()
            self.cache.bind(self._step)
            self._step.bind_ortvalue_output(self._logits.name, self._step_value)
        # Should the run be interrupted, the next one starts from a fresh binding of the cache.
        self._stale = True
        self._session.run_with_iobinding(self._step)
        self._stale = self.cache.commit(self._step, 1)
        return self._step_logits[0].astype(np.float32)

    def _feed(self, info: TensorInfo, tokens: np.ndarray, keep: int) -> np.ndarray:
        """The array for an input that is not the cache."""
        new, past = len(tokens), self.length
        dtype = np.dtype(info.dtype)
        if info.role == "tokens":
            return np.array(tokens, dtype).reshape(1, new)
        if info.role == "positions":
            # Rotary positions with several axes (`[3, 1, length]`) are equal on all of them for plain text.
            lead = [dim if isinstance(dim, int) else 1 for dim in info.shape[:-1]]
            return np.array(np.broadcast_to(np.arange(past, past + new), [*lead, new]), dtype)
        if info.role == "mask":
            return np.ones((1, past + new), dtype)
        if info.role == "token_types":
            return np.zeros((1, new), dtype)
        if info.role == "past_length":
            return np.array([past], dtype)
        assert info.role == "logits_to_keep"
        return np.array([keep], dtype)
