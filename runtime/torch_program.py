"""Artifacts of target `torch`: an exported program with flat inputs and outputs, on our kernels of the CPU or of a GPU.

torch is imported when such an artifact is opened, never before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.runtime.artifact import Artifact, TensorInfo
from qcompiler.runtime.cache import START_CAPACITY
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
        self.device = find_device(place.device, dtype=place.dtype)
        if threads is not None:
            torch.set_num_threads(threads)
        self.artifact, self.place = artifact, place
        path = artifact.file(artifact.entry)
        try:
            self.module = torch.export.load(path).module(check_guards=False)
        except Exception as error:  # torch's loader has no error of its own
            raise InputError(f"{path} cannot be loaded by torch: {error}") from error
        if place.dtype != "float32":
            from qcompiler.runtime.precision import narrow

            narrow(self.module, getattr(torch, place.dtype), artifact)
        if self.device.type != "cpu":
            self._move(capacity)

    def _move(self, capacity: int | None) -> None:
        from qcompiler.runtime.relocate import relocate

        context = self.artifact.context or START_CAPACITY
        cache = cache_bytes(self.artifact, capacity or min(START_CAPACITY, context), self.place.dtype)
        needed = {"the program": tensor_bytes(self.module), "its cache": cache}
        check_fits(
            self.device, needed, str(self.artifact.path),
            "compile with fewer bits, ask for a smaller capacity, or free memory on the device",
        )  # fmt: skip
        relocate(self.module, self.device)

    def tensor(self, value: Any, info: TensorInfo) -> torch.Tensor:
        """An input as the program takes it: on its device, of its type."""
        from qcompiler.runtime.precision import input_dtype

        tensor = self._torch.as_tensor(value)
        return tensor.to(self.device, input_dtype(info, tensor.dtype, getattr(self._torch, self.place.dtype)))

    def call(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Every output by name, on the device; `given` holds arrays or tensors for every input."""
        tensors = [self.tensor(given[info.name], info) for info in self.artifact.inputs]
        with self._torch.no_grad():
            results = self.module(*tensors)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        return dict(zip([info.name for info in self.artifact.outputs], results, strict=True))

    def run(self, given: dict[str, Any]) -> dict[str, np.ndarray]:
        """Every output by name, as an array."""
        return {name: _array(value) for name, value in self.call(given).items()}


def _array(value: torch.Tensor) -> np.ndarray:
    """On the CPU; of floats, float32."""
    return (value.float() if value.is_floating_point() else value).cpu().numpy()


def cache_bytes(artifact: Artifact, capacity: int, dtype: str = "float32") -> int:
    """Bytes of a decoder's cache of `capacity` positions, its keys and values of `dtype`; 0 of a model without one."""
    if artifact.cache is None:
        return 0
    pasts = {past for past, _ in artifact.cache.pairs()}
    return sum(
        math.prod(capacity if isinstance(size, str) else size for size in info.shape)
        * (2 if dtype != "float32" and info.role != "past_state" else np.dtype(info.dtype).itemsize)
        for info in artifact.inputs
        if info.name in pasts
    )
