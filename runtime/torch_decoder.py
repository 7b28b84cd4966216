"""Decoders of target `torch`: with a cache that stays in place where the program allows it, else with one that grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import TensorInfo
from qcompiler.runtime.cache import START_CAPACITY
from qcompiler.runtime.torch_program import TorchProgram

if TYPE_CHECKING:
    from qcompiler.runtime.cuda_graph import Capture, StepGraph
    from qcompiler.runtime.static_cache import StaticProgram


def torch_decoder(program: TorchProgram, capacity: int | None = None) -> StaticDecoder | GrowingDecoder:
    """What `Session` needs of a decoder (see `Decoder`).

    Args:
        program: of a decoder.
        capacity: positions that a static cache has room for at the start; by default those of a shared one.
    """
    from qcompiler.runtime.static_cache import Refused, static_program

    if program.artifact.cache is None:
        raise UnsupportedError(f"{program.artifact.path} is a decoder without a cache, which cannot generate")
    try:
        static = static_program(program.module, program.artifact, program.device)
    except Refused as why:
        return GrowingDecoder(program, str(why))
    return StaticDecoder(program, static, capacity)


class _Decoder:
    """What both have.

    Attributes:
        cache_kind: `static` or `growing`.
        reason: why a cache grows; None where it does not.
    """

    cache_kind: str
    reason: str | None = None

    def __init__(self, program: TorchProgram) -> None:
        artifact = program.artifact
        assert artifact.cache is not None
        logits = [info for info in artifact.outputs if info.role == "logits"]
        if not logits or not isinstance(logits[0].shape[-1], int):
            raise InputError(f"{artifact.path}: no output with the role `logits` and a fixed last axis")
        self._program, self._logits = program, logits[0].name
        self.vocabulary = int(logits[0].shape[-1])
        self.step = artifact.cache.step
        self._infos = {info.name: info for info in artifact.inputs}
        self._length = 0

    @property
    def length(self) -> int:
        return self._length


class GrowingDecoder(_Decoder):
    """Every run makes a new present by concatenation, which is the next run's past."""

    cache_kind = "growing"

    def __init__(self, program: TorchProgram, reason: str | None = None) -> None:
        super().__init__(program)
        self.reason = reason
        self._pairs = program.artifact.cache.pairs() if program.artifact.cache is not None else []
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._length = 0
        self._cache: dict[str, Any] = {past: _zeros(self._infos[past], 0) for past, _ in self._pairs}

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


class StaticDecoder(_Decoder):
    """Keys and values in buffers that are written in place: a step has the same shapes and addresses every time.

    Attributes:
        module: the program with its buffers, a `torch.nn.Module` of (tokens int64 `[1, n]`, filled int64 `[]`) that gives
            float logits `[1, n, vocabulary]`; `torch.compile` takes it, also in mode `max-autotune`.
        capacity: positions that the buffers hold now.
        reallocations: how often they were replaced by larger ones.
        uncaptured: why one-token steps are no CUDA graph; None where they are.

    Args:
        program, static: as loaded, and with its cache in place.
        capacity: positions at the start.
        capture: how steps are captured; by default as CUDA graphs, on a GPU alone.
    """

    cache_kind = "static"

    def __init__(
        self, program: TorchProgram, static: StaticProgram, capacity: int | None = None, capture: Capture | None = None
    ) -> None:
        import torch

        from qcompiler.runtime import cuda_graph
        from qcompiler.runtime.static_module import StaticModule

        super().__init__(program)
        self._torch, self._static = torch, static
        self._most = min([size for size in (static.limit, program.artifact.context) if size is not None], default=None)
        start = capacity or START_CAPACITY
        self.capacity = start if self._most is None else min(start, self._most)
        self.reallocations = 0
        self._states = {past for past in static.pasts if not _grows(self._infos[past])}
        pasts = [program.tensor(_zeros(self._infos[past], self.capacity), self._infos[past]) for past in static.pasts]
        self.module = StaticModule(static, pasts)
        self._filled = torch.zeros((), dtype=torch.int64, device=program.device)
        self._capture = capture or (cuda_graph.capture if program.device.type == "cuda" else None)
        self._graph: StepGraph | None = None
        self.uncaptured = f"on {program.device}" if self._capture is None else cuda_graph.what_cannot_be_captured(static.module)

    def reset(self) -> None:
        """Forget everything. What the buffers still hold is masked; states begin at zero."""
        self._length = 0
        self.module.clear([past in self._states for past in self._static.pasts])

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Append `tokens` [n] int64; the logits of the last `keep` of them, float32 [keep, vocabulary]."""
        from qcompiler.runtime.cuda_graph import NotCaptured

        torch, count = self._torch, len(tokens)
        self._reserve(count)
        if count == 1 and self.uncaptured is None:
            try:
                logits = self._captured().run(int(tokens[0]), self._length)
            except NotCaptured as why:
                self._graph, self.uncaptured = None, str(why)
            else:
                self._length += 1
                return logits[0].float().cpu().numpy()
        ids = torch.from_numpy(np.ascontiguousarray(tokens[None], np.int64)).to(self._program.device)
        self._filled.fill_(self._length)
        with torch.no_grad():
            logits = self.module(ids, self._filled)
        self._length += count
        return logits[0, count - keep :].float().cpu().numpy()

    def _captured(self) -> StepGraph:
        """The graph of the buffers as they are now."""
        if self._graph is None:
            from qcompiler.runtime.cuda_graph import StepGraph

            assert self._capture is not None
            states = [t for t, past in zip(self.module.pasts(), self._static.pasts, strict=True) if past in self._states]
            self._graph = StepGraph(self.module, states, self._program.device, self._capture)
        return self._graph

    def _reserve(self, new: int) -> None:
        """Room for `new` positions more, in buffers of twice the size where they are full."""
        needed = self._length + new
        if needed <= self.capacity:
            return
        if self._static.limit is not None and needed > self._static.limit:
            raise InputError(
                f"{self._program.artifact.path}: its tables have room for {self._static.limit} positions, {needed} are asked for"
            )
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        self.capacity = max(needed, capacity if self._most is None else min(capacity, self._most))
        pasts = []
        for past, old in zip(self._static.pasts, self.module.pasts(), strict=True):
            info = self._infos[past]
            if past in self._states:
                pasts.append(old)
                continue
            larger = self._program.tensor(_zeros(info, self.capacity), info)
            filled = tuple(slice(self._length) if isinstance(size, str) else slice(None) for size in info.shape)
            larger[filled] = old[filled]
            pasts.append(larger)
        self.module.replace(pasts)
        self._graph = None  # it was captured with the addresses of the old ones
        self.reallocations += 1


def _grows(info: TensorInfo) -> bool:
    return any(isinstance(size, str) for size in info.shape)


def _zeros(info: TensorInfo, length: int) -> np.ndarray:
    """A cache tensor of `length` positions; a state before the first token."""
    return np.zeros([length if isinstance(size, str) else size for size in info.shape], info.dtype)
