"""Tensors that live in files: written once, mapped back, dropped and re-read by the system as it needs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch

from qcompiler.artifact.files import FULL
from qcompiler.errors import CapacityError

T = TypeVar("T")

_counter = itertools.count()


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor without gradients, in place: nothing is copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def mapped(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Write `tensor` to `path` and return the same numbers mapped from there.

    The file is written once and must stay as it is while the result lives; a write into the result changes the process's
    own pages only. The result is contiguous.

    Args:
        path: a new file, on a disk: pages of a file system in memory are memory still.

    Raises:
        CapacityError: the disk is full.
    """
    if tensor.numel() == 0:
        return tensor
    data = tensor.detach().contiguous()
    try:
        with open(path, "xb") as file:
            file.write(memory(data))
    except OSError as error:
        if error.errno in FULL:
            raise CapacityError(
                f"cannot write {path}: {FULL[error.errno]}; {data.nbytes:,} bytes of a tensor were to be written"
            ) from error
        raise
    return torch.from_file(str(path), shared=False, size=data.numel(), dtype=data.dtype).reshape(data.shape)


def kept(tensors: dict[str, torch.Tensor], folder: Path | None, name: str) -> dict[str, torch.Tensor]:
    """Every tensor mapped from a file of its own in `folder`; as they are where `folder` is None."""
    if folder is None:
        return tensors
    return {key: mapped(tensor, _new_file(folder, f"{name}.{key}")) for key, tensor in tensors.items()}


def kept_fields(value: T, folder: Path | None, name: str) -> T:
    """A dataclass with its tensors mapped from files in `folder`; as it is where `folder` is None."""
    if folder is None:
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    tensors = {key: field for key, field in fields.items() if isinstance(field, torch.Tensor)}
    changes: dict[str, Any] = kept(tensors, folder, name)
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]


def _new_file(folder: Path, name: str) -> Path:
    """A name that no other file of this process has; what it holds can be told from it."""
    readable = re.sub(r"[^\w.-]", "_", name)[-120:]
    return folder / f"{os.getpid()}-{next(_counter)}-{readable}"
