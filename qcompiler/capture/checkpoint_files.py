"""Check a checkpoint's files before a framework opens them, so that an error names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qcompiler.errors import InputError, UnsupportedError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file; `missing` is the message where there is no such file."""
    if not path.is_file():
        raise InputError(missing)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__}; expected an object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, all present, with readable headers and every tensor that the index names."""
    index = directory / _INDEX
    if index.is_file():
        return _sharded(directory, index)
    single = directory / _SINGLE
    if single.is_file():
        tensor_names(single)
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{directory} has its weights in pickle files ({pickles[0]}), which can run code when they are read: "
            "convert them to safetensors"
        )
    raise InputError(f"{directory} has no weights: expected {_SINGLE} or {_INDEX}")


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file; reads its header only, and checks that the data is all there.

    Raises:
        InputError: the file is not whole.
        UnsupportedError: a matrix is stored as integers or in 8 bits: what its numbers stand for is written elsewhere.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: (str(part.get_dtype()), len(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated ({path.stat().st_size} bytes): {error}") from error
    for name, (dtype, axes) in stored.items():
        if name.endswith(".weight") and axes == 2 and dtype not in _FLOATS:
            raise UnsupportedError(
                f"{path}: {name} is stored as {dtype}: this checkpoint is quantized already, though its configuration does not "
                f"say so; expected {', '.join(_FLOATS)}: give the model that it was made from"
            )
    return set(stored)


def _sharded(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index, missing="").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    shards: list[Path] = []
    for name in sorted(set(weight_map.values())):
        shard = directory / str(name)
        if shard.parent != directory:
            raise InputError(f"{index} names {name!r}, which lies outside the checkpoint")
        if not shard.is_file():
            raise InputError(f"{directory} lacks the shard {name}, which {index.name} names")
        lost = sorted({tensor for tensor, file in weight_map.items() if file == name} - tensor_names(shard))
        if lost:
            raise InputError(f"{shard} lacks {len(lost)} tensors that {index.name} places there, such as {lost[0]}")
        shards.append(shard)
    return shards
