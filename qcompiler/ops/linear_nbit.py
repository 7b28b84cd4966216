"""`linear_nbit`: y = x · Wᵀ (+ bias) with a packed affine weight of 8, 4, 3 or 2 bits, and its edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.ops import layout, linear_edges
from qcompiler.ops.activation_range import INPUTS, given_range, quantize_static, range_inputs
from qcompiler.ops.formats import ACTIVATION_BLOCK, BITS, GROUPS, LAYOUT_VERSION, Activation, AffineFormat
from qcompiler.ops.spec import Case, Input, OpSpec, declare


def quantize_activations(x: np.ndarray, activation: Activation) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 activations, scale = absmax / 127, round half to even.

    Args:
        x: float32 `[rows, k]`.
        activation: `INT8_TOKEN` (one scale a row) or `INT8_BLOCK` (one per 128 inputs, the last block may be short).

    Returns:
        Integers as float32 `[rows, k]`, and the scale of each element's block, float32 `[rows, k]`.
    """
    rows, k = x.shape
    width = k if activation is Activation.INT8_TOKEN else ACTIVATION_BLOCK
    q, scale = np.zeros_like(x), np.zeros_like(x)
    for start in range(0, k, width):
        block = x[:, start : start + width]
        s = np.abs(block).max(axis=1, keepdims=True) / np.float32(127)
        safe = np.where(s == 0, np.float32(1), s)
        q[:, start : start + width] = np.clip(np.rint(block / safe), -127, 127)
        scale[:, start : start + width] = s
    return q, scale


def unpack(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The integers `q − Z`, float32 `[n, k]`, and the scales, float32 `[n, groups]`, of a packed weight."""
    n, k, bits, group = (attributes[name] for name in ("n", "k", "bits", "group"))
    zeros = inputs.get("zeros")
    format = AffineFormat(bits, group, zeros is None)
    codes = layout.unpack_codes(inputs["codes"], n, k, bits).astype(np.float32)
    scales = layout.unpack_scales(inputs["scales"], n).astype(np.float32)
    if zeros is None:
        return codes - np.float32(format.center), scales
    z = layout.unpack_zeros(zeros, n, bits).astype(np.float32)
    return codes - np.repeat(z, group or k, axis=1)[:, :k], scales


def reference(inputs: Mapping[str, Any], attributes: Mapping[str, int]) -> np.ndarray:
    """The arithmetic of docs/layout.md, segment by segment, accumulated in float64."""
    x = linear_edges.normalized(inputs, attributes)
    n, k, group = attributes["n"], attributes["k"], attributes["group"]
    activation = Activation(attributes["activation"])
    centred, scales = unpack(inputs, attributes)
    rows = x.reshape(-1, k)
    if activation is Activation.FLOAT:
        q, sa = rows, np.ones_like(rows)
    elif activation is Activation.INT8_STATIC:
        scale, zero = given_range(inputs)
        # q − Z as it is: the offset is the kernels' way to get there
        q, sa = quantize_static(rows, scale, zero), np.full_like(rows, scale)
    else:
        q, sa = quantize_activations(rows, activation)
    segment = min(group or k, ACTIVATION_BLOCK if activation is Activation.INT8_BLOCK else k)
    y = np.zeros((rows.shape[0], n))
    for start in range(0, k, segment):
        part = slice(start, min(start + segment, k))
        dot = q[:, part].astype(np.float64) @ centred[:, part].astype(np.float64).T
        weight_scale = scales[:, start // group if group else 0].astype(np.float64)
        y += dot * (weight_scale[None, :] * sa[:, start].astype(np.float64)[:, None])
    if inputs.get("bias") is not None:
        y += inputs["bias"]
    return linear_edges.finished(y.astype(np.float32).reshape(*x.shape[:-1], n), inputs, attributes)


def variant(attributes: Mapping[str, int], present: frozenset[str]) -> str:
    """For instance `int4-g32-sym_int8-block128_bias`, `int8-row-sym_int8-static_zero`, `int4-g32-sym_float_norm_silu`.

    Raises:
        ValueError: edges that do not fit.
    """
    weight = AffineFormat(attributes["bits"], attributes["group"], "zeros" not in present).label
    parts = [weight, Activation(attributes["activation"]).label]
    parts += [word for word, name in (("zero", "activation_zero"), ("bias", "bias")) if name in present]
    return "_".join(parts + linear_edges.words(attributes, present))


def random_weight(
    rng: np.random.Generator, n: int, k: int, format: AffineFormat
) -> tuple[dict[str, np.ndarray | None], dict[str, int]]:
    """A random packed weight over the full range of codes: its tensors and attributes (for tests and benchmarks)."""
    low, high = format.code_range
    groups = format.groups(k)
    codes = rng.integers(low, high + 1, (n, k))
    scales = rng.uniform(0.001, 0.02, (n, groups)).astype(np.float16)
    zeros = None if format.symmetric else layout.pack_zeros(rng.integers(low, high + 1, (n, groups)), format.bits)
    tensors = {"codes": layout.pack_codes(codes, format.bits), "scales": layout.pack_scales(scales), "zeros": zeros}
    return tensors, {"bits": format.bits, "group": format.group, "n": n, "k": k, "layout_version": LAYOUT_VERSION}


def random_range(
    rng: np.random.Generator,
    tensors: Mapping[str, np.ndarray | None],
    attributes: Mapping[str, int],
    activation: Activation,
    asymmetric: bool,
) -> dict[str, np.ndarray | None]:
    """A range for static activations that cuts off some of a normal distribution; nothing for others."""
    if activation is not Activation.INT8_STATIC:
        return dict.fromkeys(INPUTS)
    n, k, bits, group = (attributes[name] for name in ("n", "k", "bits", "group"))
    packed, packed_scales, zeros = tensors["codes"], tensors["scales"], tensors["zeros"]
    assert packed is not None and packed_scales is not None
    codes = layout.unpack_codes(packed, n, k, bits)
    points = None if zeros is None else layout.unpack_zeros(zeros, n, bits)
    zero = int(rng.choice([-128, -77, -1, 1, 50, 127])) if asymmetric else 0
    format = AffineFormat(bits, group, zeros is None)
    scales = layout.unpack_scales(packed_scales, n)
    return range_inputs(float(rng.uniform(0.01, 0.02)), zero, codes, scales, points, format)


def cases() -> Iterable[Case]:
    """Every format and activation, with whole and short tiles, groups and blocks, one row and several."""
    yield from _dynamic_cases()
    yield from _static_cases()
    yield from linear_edges.cases(_plain_case)


def _plain_case(rng: np.random.Generator, lead: tuple[int, ...], n: int, k: int, number: int) -> Case:
    """Widths, groups, kinds of activation and zero points in turn, each at its own pace."""
    format = AffineFormat(BITS[number % 4], GROUPS[number // 4 % 4], number % 3 > 0)
    activation = Activation((number + number // 4) % 4)
    tensors, attributes = random_weight(rng, n, k, format)
    tensors |= random_range(rng, tensors, attributes, activation, number % 2 > 0)
    x = rng.standard_normal((*lead, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if number % 5 > 1 else None
    label = f"{format.label} {activation.label} x{list(x.shape)} n{n}{'' if bias is None else ' bias'}"
    return Case(label, {"x": x, **tensors, "bias": bias}, {**attributes, "activation": int(activation)})


def _static_cases() -> Iterable[Case]:
    """Static activations, symmetric and with a zero point; every format on two of the shapes each, in turn."""
    rng = np.random.default_rng(3)
    shapes = [((1,), 16, 128), ((3,), 33, 96), ((2, 5), 47, 200), ((20,), 40, 256)]
    shapes += [((1,), 1, 33), ((0,), 16, 64), ((1,), 20, 300)]
    number = 0
    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                for asymmetric in (False, True, True):
                    format, (lead, n, k) = AffineFormat(bits, group, symmetric), shapes[number % len(shapes)]
                    number += 1
                    tensors, attributes = random_weight(rng, n, k, format)
                    tensors |= random_range(rng, tensors, attributes, Activation.INT8_STATIC, asymmetric)
                    x = rng.standard_normal((*lead, k)).astype(np.float32)
                    bias = rng.standard_normal(n).astype(np.float32) if number % 2 else None
                    attributes["activation"] = int(Activation.INT8_STATIC)
                    label = f"{format.label} int8-static x{list(x.shape)} n{n}{' Z' * asymmetric}{' bias' * (number % 2)}"
                    yield Case(label, {"x": x, **tensors, "bias": bias}, attributes)


def _dynamic_cases() -> Iterable[Case]:
    rng = np.random.default_rng(0)
    shapes = [((1,), 16, 128), ((3,), 33, 96), ((2, 5), 47, 200), ((20,), 64, 256), ((1,), 1, 33), ((0,), 16, 64)]
    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                for activation in (Activation.FLOAT, Activation.INT8_TOKEN, Activation.INT8_BLOCK):
                    for index, (lead, n, k) in enumerate(shapes):
                        format = AffineFormat(bits, group, symmetric)
                        tensors, attributes = random_weight(rng, n, k, format)
                        x = rng.standard_normal((*lead, k)).astype(np.float32)
                        bias = rng.standard_normal(n).astype(np.float32) if index % 2 else None
                        attributes["activation"] = int(activation)
                        label = f"{format.label} {activation.label} x{list(x.shape)} n{n}{' bias' if index % 2 else ''}"
                        yield Case(label, {"x": x, **tensors, "bias": bias}, attributes)


RANGE_INPUTS = (
    Input("activation_scale", "float32", optional=True),
    Input("activation_zero", "int8", optional=True),
    Input("activation_offset", "float32", optional=True),
)

LINEAR_NBIT = declare(
    OpSpec(
        name="linear_nbit",
        onnx_name="LinearNBit",
        doc="Y[..., n] = X[..., k] · Wᵀ + bias, W[n, k] = S · (q − Z) packed in layout W16x4. With norm X is RMSNorm(X); "
        "with gate n = 2h and Y[..., h] = act(Y[..., :h]) · Y[..., h:]; then + residual.",
        inputs=(
            Input("x", "float32"),
            Input("codes", "uint8"),
            Input("scales", "float16"),
            Input("zeros", "uint8", optional=True),
            Input("bias", "float32", optional=True),
            *RANGE_INPUTS,
            *linear_edges.INPUTS,
        ),
        attributes=("bits", "group", "n", "k", "activation", "layout_version", *linear_edges.DEFAULTS),
        output_shape=lambda shapes, attributes: (*shapes["x"][:-1], linear_edges.output_columns(attributes)),
        reference=reference,
        variant=variant,
        cases=cases,
        defaults=linear_edges.DEFAULTS,
    )
)
