"""`linear_experts_nbit`: every row times the packed matrix of its own expert, y_i = W[expert_i] · x_i (+ bias[expert_i])."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.ops import linear_nbit
from qcompiler.ops.formats import BITS, GROUPS, Activation, AffineFormat
from qcompiler.ops.spec import Case, Input, OpSpec, declare


def expert_slice(inputs: Mapping[str, Any], attributes: Mapping[str, int], expert: int) -> dict[str, Any]:
    """The inputs of `linear_nbit` that hold one expert's matrix: its tiles of every stacked tensor, its row of the bias."""
    tiles = len(inputs["codes"]) // attributes["experts"]
    part = {
        name: None if inputs.get(name) is None else inputs[name][expert * tiles : (expert + 1) * tiles]
        for name in ("codes", "scales", "zeros")
    }
    return part | {"bias": None if inputs.get("bias") is None else inputs["bias"][expert]}


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """`linear_nbit`'s reference, expert by expert.

    Raises:
        ValueError: an index outside `[0, experts)`.
    """
    x, expert = np.asarray(inputs["x"], np.float32), np.asarray(inputs["expert"])
    y = np.zeros((len(x), attributes["n"]), np.float32)
    for index in np.unique(expert):
        if not 0 <= index < attributes["experts"]:
            raise ValueError(f"expert {index} of {attributes['experts']}")
        rows = expert == index
        y[rows] = linear_nbit.reference({"x": x[rows], **expert_slice(inputs, attributes, int(index))}, attributes)
    return y


def random_experts(
    rng: np.random.Generator, experts: int, n: int, k: int, format: AffineFormat
) -> tuple[dict[str, np.ndarray | None], dict[str, int]]:
    """Random packed weights of several experts: their stacked tensors and the attributes."""
    weights = [linear_nbit.random_weight(rng, n, k, format) for _ in range(experts)]
    tensors = {
        name: None if array is None else np.concatenate([tensors[name] for tensors, _ in weights])
        for name, array in weights[0][0].items()
    }
    return tensors, {**weights[0][1], "experts": experts}


def cases() -> Iterable[Case]:
    """Every format and activation: experts with several rows, one, and none; whole and short tiles, groups and blocks."""
    rng = np.random.default_rng(0)
    shapes = [(1, 3, 16, 128), (9, 4, 33, 96), (7, 1, 16, 40), (12, 5, 20, 200), (0, 2, 16, 64)]
    number = 0
    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                for activation in (Activation.FLOAT, Activation.INT8_TOKEN, Activation.INT8_BLOCK):
                    # Two shapes a variant, in turn: a stock runtime takes long to read a body.
                    for rows, experts, n, k in (shapes[number % len(shapes)], shapes[(number + 1) % len(shapes)]):
                        number += 1
                        format = AffineFormat(bits, group, symmetric)
                        tensors, attributes = random_experts(rng, experts, n, k, format)
                        x = rng.standard_normal((rows, k)).astype(np.float32)
                        bias = rng.standard_normal((experts, n)).astype(np.float32) if number % 2 else None
                        inputs = {"x": x, "expert": rng.integers(0, experts, rows), **tensors, "bias": bias}
                        attributes["activation"] = int(activation)
                        label = f"{format.label} {activation.label} x{[rows, k]} n{n} of {experts}"
                        yield Case(label + (" bias" if number % 2 else ""), inputs, attributes)


LINEAR_EXPERTS_NBIT = declare(
    OpSpec(
        name="linear_experts_nbit",
        onnx_name="LinearExpertsNBit",
        doc="Y[i] = W[expert[i]] · X[i] + bias[expert[i]]; W[experts, n, k] = S · (q − Z), each matrix packed in layout "
        "W16x4, one after another.",
        inputs=(
            Input("x", "float32"),
            Input("expert", "int64"),
            Input("codes", "uint8"),
            Input("scales", "float16"),
            Input("zeros", "uint8", optional=True),
            Input("bias", "float32", optional=True),
        ),
        attributes=("bits", "group", "experts", "n", "k", "activation", "layout_version"),
        output_shape=lambda shapes, attributes: (shapes["x"][0], attributes["n"]),
        reference=reference,
        variant=linear_nbit.variant,
        cases=cases,
    )
)
