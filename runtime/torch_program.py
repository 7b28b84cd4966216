"""Artifacts of target `torch`: an exported program with flat inputs and outputs, on our CPU kernels.

torch is imported when such an artifact is opened, never before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact, TensorInfo

if TYPE_CHECKING:
    import torch


class TorchProgram:
    """The program of an artifact, called with arrays by name.

    Raises:
        UnsupportedError: torch is not installed.
        InputError: the program cannot be loaded.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        try:
            import torch

            import qcompiler.ops.torch_ops  # noqa: F401  registers the ops that the program calls
        except ImportError as error:
            raise UnsupportedError(
                f"{artifact.path} was compiled for torch, which is not installed: pip install 'qcompiler[compile]'"
            ) from error
        self._torch = torch
        if threads is not None:
            torch.set_num_threads(threads)
        self.artifact = artifact
        path = artifact.file(artifact.entry)
        try:
            self.module = torch.export.load(path).module(check_guards=False)
        except Exception as error:  # torch's loader has no error of its own
            raise InputError(f"{path} cannot be loaded by torch: {error}") from error

    def run(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Every output by name; `given` holds arrays or tensors for every input."""
        torch = self._torch
        tensors = [torch.as_tensor(given[info.name]) for info in self.artifact.inputs]
        with torch.no_grad():
            results = self.module(*tensors)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        return dict(zip([info.name for info in self.artifact.outputs], results, strict=True))


class TorchDecoder:
    """A decoder of target `torch`: what `Session` needs (see `Decoder`). The cache grows by concatenation."""

    def __init__(self, program: TorchProgram) -> None:
        artifact = program.artifact
        if artifact.cache is None:
            raise UnsupportedError(f"{artifact.path} is a decoder without a cache, which cannot generate")
        logits = [info for info in artifact.outputs if info.role == "logits"]
        if not logits or not isinstance(logits[0].shape[-1], int):
            raise InputError(f"{artifact.path}: no output with the role `logits` and a fixed last axis")
        self._program, self._logits = program, logits[0].name
        self.vocabulary = int(logits[0].shape[-1])
        self._pairs = artifact.cache.pairs()
        self.step = artifact.cache.step
        self._infos = {info.name: info for info in artifact.inputs}
        self.reset()

    @property
    def length(self) -> int:
        return self._length

    def reset(self) -> None:
        """Forget everything."""
        self._length = 0
        self._cache: dict[str, Any] = {past: _empty(self._infos[past]) for past, _ in self._pairs}

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Append `tokens` [n] int64; the logits of the last `keep` of them, float32 [keep, vocabulary]."""
        count, total = len(tokens), self._length + len(tokens)
        feeds: dict[str, Any] = dict(self._cache)
        for name, info in self._infos.items():
            if info.role == "tokens":
                feeds[name] = tokens[None].astype(info.dtype)
            elif info.role == "positions":
                lead = [dim if isinstance(dim, int) else 1 for dim in info.shape[:-1]]
                feeds[name] = np.broadcast_to(np.arange(self._length, total, dtype=info.dtype), [*lead, count]).copy()
            elif info.role == "mask":
                feeds[name] = np.ones((1, total), info.dtype)
            elif info.role == "token_types":
                feeds[name] = np.zeros((1, count), info.dtype)
            elif name not in feeds:
                raise UnsupportedError(f"nothing is known to feed to the input {name!r} {list(info.shape)}")
        results = self._program.run(feeds)
        self._cache = {past: results[present] for past, present in self._pairs}
        self._length = total
        return results[self._logits][0, count - keep :].numpy()


def _empty(info: TensorInfo) -> np.ndarray:
    """A cache tensor of no positions; a state before the first token."""
    return np.zeros([0 if isinstance(size, str) else size for size in info.shape], info.dtype)
