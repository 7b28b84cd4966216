"""Calibration samples that the caller gives, as arguments of the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.feeds import TOKENS, steps, takes_tokens
from qcompiler.capture.plain import keyword_arguments
from qcompiler.capture.prepared import Prepared
from qcompiler.errors import InputError, UsageError

Samples = Callable[[], Iterable[dict[str, Any]]]


def collected(calibration: Iterable[Any], count: int | None) -> Collection[Any]:
    """The first `count` samples, all by default, in a form that every pass can go through.

    Raises:
        InputError: there is none.
    """
    many = calibration if isinstance(calibration, Collection) and not isinstance(calibration, (torch.Tensor, Mapping)) else None
    if many is None:
        if isinstance(calibration, (torch.Tensor, Mapping)):
            raise UsageError(f"calibration is one {type(calibration).__name__}; expected an iterable of samples, such as a list")
        many = list(calibration)
    if count is not None and count < len(many):
        many = [sample for sample, _ in zip(many, range(count), strict=False)]
    if not len(many):
        raise InputError("calibration holds no sample")
    return many


def given_samples(prepared: Prepared, calibration: Collection[Any], plain: bool) -> Samples:
    """What reads `calibration` as arguments of the graph, in its order.

    Args:
        prepared: the model as prepared.
        calibration: samples: token ids `[length]` or `[1, length]`, or a mapping with `input_ids`, of a model that takes text; of
            a plain module what its example is: keyword arguments, a tuple of positional ones, or one tensor.
        plain: whether the model was captured with the caller's example.

    Raises (when read):
        InputError: a sample that the graph does not take; names it by its number, and the input.
        UnsupportedError: the model takes neither tokens nor an example.
    """
    if not plain and not takes_tokens(prepared):
        raise UsageError(f"{prepared.description} takes no token ids: give example inputs, and samples of their form")

    def read() -> Iterator[dict[str, Any]]:
        for index, sample in enumerate(calibration):
            if plain:
                yield _arguments(prepared, sample, index)
            else:
                yield from steps(prepared, _tokens(sample, index))

    return read


def _tokens(sample: Any, index: int) -> torch.Tensor:
    found = sample.get(TOKENS) if isinstance(sample, Mapping) else sample
    if found is None:
        raise InputError(f"calibration sample {index} has no {TOKENS!r}; found {sorted(sample)}")
    try:
        tokens = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"calibration sample {index} is {type(found).__name__}, expected token ids: {error}") from error
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.is_floating_point() or tokens.dim() != 2 or len(tokens) != 1 or not tokens.numel():
        kind = str(tokens.dtype).removeprefix("torch.")
        raise InputError(f"calibration sample {index} is {kind} {list(tokens.shape)}, expected token ids [length] or [1, length]")
    return tokens.long()


def _arguments(prepared: Prepared, sample: Any, index: int) -> dict[str, Any]:
    """A sample as the graph's own arguments, of the types that it was captured with."""
    try:
        given = keyword_arguments(prepared.module, sample)
    except UsageError as error:
        raise InputError(f"calibration sample {index}: {error}") from error
    if missing := sorted(prepared.inputs.keys() - given.keys()):
        raise InputError(f"calibration sample {index} has no {', '.join(missing)}; the graph takes {', '.join(prepared.inputs)}")
    arguments = {name: _like(given[name], value) for name, value in prepared.inputs.items()}
    expected, found = get_leaf_tensors(prepared.inputs), get_leaf_tensors(arguments)
    for path, tensor in expected.items():
        other = found.get(path)
        if other is None or other.dtype != tensor.dtype or not _fits(other, tensor, prepared.axes.get(path, {})):
            wanted = [prepared.axes.get(path, {}).get(axis, size) for axis, size in enumerate(tensor.shape)]
            have = "missing" if other is None else f"{other.dtype} {list(other.shape)}"
            raise InputError(f"calibration sample {index}: {path} is {have}, the graph takes {tensor.dtype} {wanted}")
    return {name: value for name, value in arguments.items() if name in prepared.dynamic_shapes}


def _like(value: Any, example: Any) -> Any:
    """Floating tensors as float32 where the example's are: a module of half precision was captured in it."""
    wide = any(t.dtype is torch.float32 for t in get_leaf_tensors({"": example}).values())
    return tree_map_only(torch.Tensor, lambda t: t.float() if wide and t.is_floating_point() else t, value)


def _fits(tensor: torch.Tensor, example: torch.Tensor, axes: Mapping[int, str]) -> bool:
    return tensor.dim() == example.dim() and all(
        axis in axes or size == tensor.shape[axis] for axis, size in enumerate(example.shape)
    )
