"""`embedding_nbit`: rows of a packed affine matrix, decoded to float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.ops.formats import BITS, GROUPS, AffineFormat
from qcompiler.ops.linear_nbit import random_weight, unpack
from qcompiler.ops.spec import Case, Input, OpSpec, declare


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """W[indices], float32 `[..., k]`; negative indices count from the end, as in ONNX Gather."""
    centred, scales = unpack(inputs, attributes)
    k, group = attributes["k"], attributes["group"]
    weight = centred * np.repeat(scales, group or k, axis=1)[:, :k]
    return weight[np.asarray(inputs["indices"])]


def variant(attributes: Mapping[str, int], present: frozenset[str]) -> str:
    """For instance `int8-row-sym`."""
    return AffineFormat(attributes["bits"], attributes["group"], "zeros" not in present).label


def cases() -> Iterable[Case]:
    """Every format, with whole and short tiles and groups; scalar, empty and nested indices."""
    rng = np.random.default_rng(1)
    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                for lead, n, k in [((4,), 64, 128), ((2, 3), 37, 100), ((0,), 16, 32), ((1,), 1, 33)]:
                    format = AffineFormat(bits, group, symmetric)
                    tensors, attributes = random_weight(rng, n, k, format)
                    indices = rng.integers(0, n, lead)
                    yield Case(f"{format.label} indices{list(lead)} n{n} k{k}", {"indices": indices, **tensors}, attributes)


EMBEDDING_NBIT = declare(
    OpSpec(
        name="embedding_nbit",
        onnx_name="EmbeddingNBit",
        doc="Y[..., k] = W[indices], W[n, k] = S · (q − Z) packed in layout W16x4.",
        inputs=(
            Input("indices", "int64"),
            Input("codes", "uint8"),
            Input("scales", "float16"),
            Input("zeros", "uint8", optional=True),
        ),
        attributes=("bits", "group", "n", "k", "layout_version"),
        output_shape=lambda shapes, attributes: (*shapes["indices"], attributes["k"]),
        reference=reference,
        variant=variant,
        cases=cases,
    )
)
