"""Artifacts of target `torch`: an exported program with flat inputs and outputs, on our kernels of the CPU or of a GPU.

torch is imported when such an artifact is opened, never before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact, TensorInfo
from qcompiler.runtime.device import Placement, check_fits, find_device, tensor_bytes

if TYPE_CHECKING:
    import torch


class TorchProgram:
    """The program of an artifact, called with arrays by name. It is moved to its device once, when it is loaded.

    Args:
        artifact: of target `torch`.
        threads: of the CPU; None leaves them to torch.
        place: the device, and the type of float activations.
        capacity: positions that a decoder's cache is to hold; they count when it is asked whether everything fits.

    Attributes:
        device: where its tensors are.
        module: the program; its inputs and outputs are the manifest's, by position.

    Raises:
        UnsupportedError: torch is not installed, or the device cannot be used (see `find_device`).
        InputError: the program cannot be loaded.
        CapacityError: the device's free memory is too small.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, place: Placement | None = None, capacity: int | None = None
    ) -> None:
        place = place or Placement()
        try:
            import torch

            import qcompiler.ops.torch_ops  # noqa: F401  registers the ops that the program calls
        except ImportError as error:
            raise UnsupportedError(
                f"{artifact.path} was compiled for torch, which is not installed: pip install 'qcompiler[compile]'"
            ) from error
        self._torch = torch
        self.device = find_device(place.device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.artifact, self.place = artifact, place
        path = artifact.file(artifact.entry)
        try:
            self.module = torch.export.load(path).module(check_guards=False)
        except Exception as error:  # torch's loader has no error of its own
            raise InputError(f"{path} cannot be loaded by torch: {error}") from error
        if self.device.type != "cpu":
            self._move(capacity)

    def _move(self, capacity: int | None) -> None:
        from qcompiler.runtime.relocate import relocate

        needed = {"the program": tensor_bytes(self.module), "its cache": cache_bytes(self.artifact, capacity)}
        check_fits(
            self.device, needed, str(self.artifact.path),
            "compile with fewer bits, ask for a smaller capacity, or free memory on the device",
        )  # fmt: skip
        relocate(self.module, self.device)

    def tensor(self, value: Any, info: TensorInfo) -> torch.Tensor:
        """An input as the program takes it: on its device, of its type."""
        return self._torch.as_tensor(value).to(self.device)

    def call(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Every output by name, on the device; `given` holds arrays or tensors for every input."""
        tensors = [self.tensor(given[info.name], info) for info in self.artifact.inputs]
        with self._torch.no_grad():
            results = self.module(*tensors)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        return dict(zip([info.name for info in self.artifact.outputs], results, strict=True))

    def run(self, given: dict[str, Any]) -> dict[str, np.ndarray]:
        """Every output by name, as an array."""
        return {name: value.cpu().numpy() for name, value in self.call(given).items()}


def cache_bytes(artifact: Artifact, capacity: int | None) -> int:
    """Bytes of a decoder's cache of `capacity` positions; its states alone where none are asked for."""
    if artifact.cache is None:
        return 0
    pasts = {past for past, _ in artifact.cache.pairs()}
    return sum(
        math.prod((capacity or 0) if isinstance(size, str) else size for size in info.shape) * np.dtype(info.dtype).itemsize
        for info in artifact.inputs
        if info.name in pasts
    )


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
        results = self._program.call(feeds)
        self._cache = {past: results[present] for past, present in self._pairs}
        self._length = total
        return results[self._logits][0, count - keep :].float().cpu().numpy()


def _empty(info: TensorInfo) -> np.ndarray:
    """A cache tensor of no positions; a state before the first token."""
    return np.zeros([0 if isinstance(size, str) else size for size in info.shape], info.dtype)
