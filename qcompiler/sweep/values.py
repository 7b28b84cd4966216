"""What lives across a cut, for every sample: in memory of the CPU, or in one file beyond the budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from qcompiler.graph.mapped import memory
from qcompiler.sweep.place import CPU, moved

ALIGNMENT = 64


class Values:
    """Per sample the values of some nodes.

    Args:
        nodes: whose values are kept.
        folder: where to write tensors; None keeps them in memory. The file has no name on disk, so nothing is left behind
            by a run that is killed.
    """

    def __init__(self, nodes: Sequence[Node], folder: Path | None = None):
        self.nodes = tuple(nodes)
        self._held: list[dict[Node, Any]] = []
        self._file = None
        if folder is not None:
            number, name = tempfile.mkstemp(prefix="values-", dir=folder)
            os.unlink(name)
            self._file = os.fdopen(number, "w+b")

    def append(self, values: Mapping[Node, Any]) -> None:
        """Keep the values of the next sample."""
        kept = {}
        for node in self.nodes:
            value = values[node]
            value = moved(value, CPU)
            kept[node] = self._spill(value) if self._file is not None else value
        self._held.append(kept)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, sample: int) -> dict[Node, Any]:
        return {node: value() if isinstance(value, _Mapped) else value for node, value in self._held[sample].items()}

    def _spill(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        assert self._file is not None
        self._file.seek(0, os.SEEK_END)
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        contiguous = value.detach().contiguous()
        self._file.write(memory(contiguous))
        self._file.flush()
        return _Mapped(self._file.fileno(), offset, tuple(value.shape), value.dtype)

    def close(self) -> None:
        """Let go of everything."""
        self._held.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class _Mapped:
    """A tensor that lies in a file; calling it gives a copy-on-write view of the pages."""

    def __init__(self, descriptor: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        self._descriptor, self._offset, self._shape, self._dtype = descriptor, offset, shape, dtype

    def __call__(self) -> torch.Tensor:
        count = int(np.prod(self._shape)) * self._dtype.itemsize
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            pages = np.memmap(file, np.uint8, "c", offset=self._offset, shape=(count,))
        return torch.from_numpy(pages).view(self._dtype).reshape(self._shape)
