"""`embedding_vq`: rows of a packed vector-quantized matrix, decoded to float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.ops.linear_vq import WEIGHT_ATTRIBUTES, WEIGHT_INPUTS, formats, random_weight, unpack, vq_format
from qcompiler.ops.spec import Case, Input, OpSpec, declare


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """W[indices], float32 `[..., k]`; negative indices count from the end, as in ONNX Gather."""
    levels, factors = unpack(inputs, attributes)
    return (factors * levels)[np.asarray(inputs["indices"])]


def variant(attributes: Mapping[str, int], present: frozenset[str]) -> str:
    """For instance `vq2d64-b32x256-g128`."""
    return vq_format(attributes).label


def cases() -> Iterable[Case]:
    """Every format, with whole and short tiles, groups and blocks; empty and nested indices."""
    rng = np.random.default_rng(5)
    shapes = (((4,), 64, 128), ((2, 3), 37, 300), ((0,), 16, 32), ((1,), 1, 33), ((7,), 80, 514))
    for number, format in enumerate(formats()):
        for lead, n, k in (shapes[number % len(shapes)], shapes[(3 * number + 1) % len(shapes)]):
            tensors, attributes = random_weight(rng, n, k, format)
            indices = rng.integers(0, n, lead)
            yield Case(f"{format.label} indices{list(lead)} n{n} k{k}", {"indices": indices, **tensors}, attributes)


EMBEDDING_VQ = declare(
    OpSpec(
        name="embedding_vq",
        onnx_name="EmbeddingVQ",
        doc="Y[..., k] = W[indices], W[n, k] = S · c · C[index], indices packed in layout W16x4.",
        inputs=(Input("indices", "int64"), *WEIGHT_INPUTS),
        attributes=(*WEIGHT_ATTRIBUTES, "layout_version"),
        output_shape=lambda shapes, attributes: (*shapes["indices"], attributes["k"]),
        reference=reference,
        variant=variant,
        cases=cases,
    )
)
