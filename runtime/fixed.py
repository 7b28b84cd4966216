"""Graphs of one length: shorter texts are filled up on their way in, and what comes of the filling is cut off."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.runtime.artifact import Artifact, FixedLength

# Inputs with one entry a token, and what stands behind a text's end in each (of tokens: the filler).
_BEHIND = {"tokens": 0, "mask": 0, "token_types": 0}


def fill(artifact: Artifact, fixed: FixedLength, given: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """The arguments at the graph's length, and how long the text is.

    Raises `UsageError` where the inputs with one entry a token are of different lengths.
    """
    roles = {info.name: info.role for info in artifact.inputs}
    lengths = {name: array.shape[-1] for name, array in given.items() if roles[name] in _BEHIND and array.ndim}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"the inputs are of different lengths: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    length = next(iter(lengths.values()), fixed.tokens)
    filled = dict(given)
    for name in lengths:
        behind = fixed.filler if roles[name] == "tokens" else _BEHIND[roles[name]]
        width = [(0, 0)] * (given[name].ndim - 1) + [(0, max(fixed.tokens - length, 0))]
        filled[name] = np.pad(given[name], width, constant_values=behind)
    return filled, length


def cut(fixed: FixedLength, outputs: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The outputs without what comes after `length` tokens."""
    found = {}
    for name, array in outputs.items():
        axis = fixed.outputs.get(name.removeprefix("output."))
        found[name] = array if axis is None else array[(slice(None),) * axis + (slice(length),)]
    return found
