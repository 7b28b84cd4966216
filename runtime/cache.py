"""Where a decoder's keys, values and states live between calls. Two kinds, one interface: bind, commit, reset.

`SharedCache`: one buffer `[1, heads, capacity, head_dim]` a tensor, bound as past and as present. Nothing is copied
per token; a full buffer is replaced by one of twice the size. A state of fixed shape has two buffers that take turns.
`GrowingCache`: the present that came out goes in as the next past, as ONNX Runtime's own value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime

from qcompiler.errors import CapacityError, InputError
from qcompiler.runtime.artifact import Artifact

# Positions that a cache starts with when nobody asked for a size: small prompts never reallocate.
START_CAPACITY = 256


class Cache(Protocol):
    """What a decoder needs of its cache. `length` counts the filled positions, `values` are the past tensors now."""

    @property
    def length(self) -> int: ...

    @property
    def values(self) -> list[onnxruntime.OrtValue]: ...

    def reserve(self, new: int) -> bool:
        """Make room for `new` positions more. True when the tensors to bind are others than before."""

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind the past tensors as inputs and the present ones as the first outputs."""

    def commit(self, binding: onnxruntime.IOBinding, new: int) -> bool:
        """After a run: `new` positions more are filled. True when the tensors to bind are others than before."""

    def reset(self) -> None:
        """Forget everything."""


@dataclass(frozen=True)
class _Tensor:
    """One past tensor: its names in the graph, its shape with None for the length, its type."""

    past: str
    present: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    def zeros(self, length: int) -> np.ndarray:
        return np.zeros([length if dim is None else dim for dim in self.shape], self.dtype)

    def filled(self, array: np.ndarray, length: int) -> np.ndarray:
        """The view of the first `length` positions."""
        return array[tuple(slice(length) if dim is None else slice(None) for dim in self.shape)]


def _tensors(artifact: Artifact) -> list[_Tensor]:
    """The past tensors of the manifest's cache: keys and values of each layer in turn, then the states."""
    assert artifact.cache is not None
    inputs = {info.name: info for info in artifact.inputs}
    states = {state.past for state in artifact.cache.states}
    tensors = []
    for past, present in artifact.cache.pairs():
        if (info := inputs.get(past)) is None:
            raise InputError(f"{artifact.path}: the cache names the input {past!r}, which `inputs` does not list")
        shape = tuple(dim if isinstance(dim, int) else None for dim in info.shape)
        if shape.count(None) != 1 and not (past in states and None not in shape):
            raise InputError(f"{artifact.path}: {past} has the shape {list(info.shape)}, expected one free axis")
        tensors.append(_Tensor(past, present, shape, np.dtype(info.dtype)))
    return tensors


def make_cache(artifact: Artifact, capacity: int | None = None) -> Cache:
    """The cache that the manifest describes, empty; a shared one with room for `capacity` positions at the start."""
    assert artifact.cache is not None
    if artifact.cache.kind == "shared":
        return SharedCache(artifact, capacity)
    return GrowingCache(artifact)


class _States:
    """States of fixed shape in two buffers each: a step reads one and writes the other, then they change places."""

    def __init__(self, tensors: list[_Tensor]) -> None:
        self._tensors = tensors
        self._arrays = [[tensor.zeros(0) for tensor in tensors] for _ in range(2)]
        values = [[onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays] for arrays in self._arrays]
        self.past, self._present = values

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        for tensor, past, present in zip(self._tensors, self.past, self._present, strict=True):
            binding.bind_ortvalue_input(tensor.past, past)
            binding.bind_ortvalue_output(tensor.present, present)

    def commit(self) -> bool:
        """The presents are the pasts of the next step. True where there are any."""
        self.past, self._present = self._present, self.past
        return bool(self._tensors)

    def reset(self) -> None:
        for array in (array for arrays in self._arrays for array in arrays):
            array.fill(0)


class SharedCache:
    """Past and present in one buffer for each tensor; exact because the graph reads the filled part only.

    Attributes:
        capacity: positions that the buffers hold now.
        reallocations: how often they were replaced by larger ones, each time copying the filled part once.
    """

    def __init__(self, artifact: Artifact, capacity: int | None = None) -> None:
        self._context = artifact.context
        tensors = _tensors(artifact)
        self._tensors = [tensor for tensor in tensors if None in tensor.shape]
        self._states = _States([tensor for tensor in tensors if None not in tensor.shape])
        self._arrays: list[np.ndarray] = []
        self.values: list[onnxruntime.OrtValue] = []
        self.length = 0
        self.reallocations = 0
        self._allocate(capacity or min(START_CAPACITY, artifact.context or START_CAPACITY))

    def _allocate(self, capacity: int) -> None:
        """Buffers of `capacity` positions, the filled part copied over."""
        try:
            # Zeros: the system gives the pages when they are first written, so an early large buffer costs little.
            arrays = [tensor.zeros(capacity) for tensor in self._tensors]
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a cache of {capacity} positions; use a shorter prompt or a smaller capacity"
            ) from error
        for tensor, old, new in zip(self._tensors, self._arrays, arrays, strict=False):
            tensor.filled(new, self.length)[...] = tensor.filled(old, self.length)
        # An OrtValue made from an array reads and writes the array's own memory, and does not keep it alive.
        self.values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        self._arrays, self.capacity = arrays, capacity

    def reserve(self, new: int) -> bool:
        needed = self.length + new
        if needed <= self.capacity:
            return False
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        self._allocate(max(needed, min(capacity, self._context or capacity)))
        self.reallocations += 1
        return True

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        for tensor, value in zip(self._tensors, self.values, strict=True):
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_ortvalue_output(tensor.present, value)
        self._states.bind(binding)

    def commit(self, binding: onnxruntime.IOBinding, new: int) -> bool:
        self.length += new
        return self._states.commit()

    def reset(self) -> None:
        self.length = 0
        self._states.reset()


class GrowingCache:
    """Every run makes a new present; it is handed back as the past without leaving ONNX Runtime."""

    def __init__(self, artifact: Artifact) -> None:
        self._tensors = _tensors(artifact)
        self._nothing = [tensor.zeros(0) for tensor in self._tensors]
        self._empty = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._nothing]
        # Values and length change together: an interrupt between two assignments must not split them.
        self._state = (self._empty, 0)

    @property
    def length(self) -> int:
        return self._state[1]

    @property
    def values(self) -> list[onnxruntime.OrtValue]:
        return self._state[0]

    def reserve(self, new: int) -> bool:
        return False

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        for tensor, value in zip(self._tensors, self.values, strict=True):
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_output(tensor.present, "cpu")

    def commit(self, binding: onnxruntime.IOBinding, new: int) -> bool:
        # The presents are the first outputs that were bound, and come back in that order.
        self._state = (list(binding.get_outputs()[: len(self._tensors)]), self.length + new)
        return True

    def reset(self) -> None:
        self._state = (self._empty, 0)
