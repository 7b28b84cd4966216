"""The edges of a linear op in a function body (docs/layout.md, "Edges"): computed in float64 and rounded to float32 where the
kernels do, so that both give the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.ops.body_builder import Body
from qcompiler.ops.linear_edges import Gate

# e^(z²) · erfc(z) · (z + 3) in t = (z − 3) / (z + 3), 0 ≤ z ≤ 10.6: by interpolation at the Chebyshev nodes, within 2^-50.
_TAIL = [
    float.fromhex(c)
    for c in (
        "0x1.12f21ddd9f5e1p+0 -0x1.c44c471baa35cp-1 0x1.2e326945de47fp-1 -0x1.3deb21415ed35p-2 0x1.e995f11ae04d7p-4 "
        "-0x1.b78993d59fe2ep-6 -0x1.3dd3e5d1c9ce1p-10 0x1.8dae3a5036eb7p-9 -0x1.1f78fcbbe8e00p-11 -0x1.22393fe42a23bp-12 "
        "0x1.c329e2ce72db8p-14 0x1.fe26986b21b0ep-16 -0x1.254378ab91891p-16 -0x1.414f2d44abcb2p-18 0x1.71e2fcca30fabp-19 "
        "0x1.1f7a35adf177ap-20 -0x1.65171ce945d59p-22 -0x1.197923e38054cp-22 -0x1.8a27b8aaf5dddp-25"
    ).split()
]


def normalized(b: Body, inputs: Mapping[str, ir.Value], present: frozenset[str]) -> ir.Value:
    """x as the product sees it: x · (1 / √(mean(x²) + epsilon)) · norm, or x itself."""
    x = inputs["x"]
    if "norm" not in present:
        return x
    wide = b.to_double(x)
    total = b.op("ReduceSum", b.op("Mul", wide, wide), b.ints(-1), keepdims=1)
    # ONNX Runtime's reductions leave the shape of a tensor without elements as it is; the slice makes it [..., 1]
    mean = b.op("Div", b.op("Slice", total, b.ints(0), b.ints(1), b.ints(-1)), b.to_double(b.attribute("k")))
    root = b.op("Sqrt", b.op("Add", mean, b.to_double(b.float_attribute("epsilon"))))
    factor = b.to_float(b.op("Div", b.constant(1, np.float64), root))
    return b.op("Mul", b.op("Mul", x, factor), inputs["norm"])


def finished(
    b: Body, product: ir.Value, inputs: Mapping[str, ir.Value], attributes: Mapping[str, Any], present: frozenset[str]
) -> ir.Value:
    """y from P `[..., n]`."""
    y, gate = product, Gate(attributes["gate"])
    if gate:
        n, last = b.attribute("n"), b.ints(-1)
        half = b.op("Div", n, b.ints(2))
        first, second = b.op("Slice", y, b.ints(0), half, last), b.op("Slice", y, half, n, last)
        y = b.op("Mul", b.to_float(_ACTIVATIONS[gate](b, b.to_double(first))), second)
    return b.op("Add", y, inputs["residual"]) if "residual" in present else y


def _at_least(b: Body, x: ir.Value, low: float) -> ir.Value:
    """Below `low` the result is −0 as it is at `low`, also for −infinity; NaN stays."""
    bound = b.constant(low, np.float64)
    return b.op("Where", b.op("Less", x, bound), bound, x)


def _sigmoid_times(b: Body, x: ir.Value, slope: ir.Value) -> ir.Value:
    """x / (1 + e^-slope). Not Sigmoid: ONNX Runtime's is 0 far below 0, where x · sigmoid(x) is small but no 0."""
    return b.op("Div", _at_least(b, x, -1000), b.op("Add", b.constant(1, np.float64), b.op("Exp", b.op("Neg", slope))))


def _silu(b: Body, x: ir.Value) -> ir.Value:
    return _sigmoid_times(b, x, x)


def _gelu_tanh(b: Body, x: ir.Value) -> ir.Value:
    linear = 2 * math.sqrt(2 / math.pi)  # 0.5 (1 + tanh u) = sigmoid(2u)
    cubic = b.op("Mul", b.op("Mul", x, x), b.constant(linear * 0.044715, np.float64))
    slope = b.op("Mul", x, b.op("Add", cubic, b.constant(linear, np.float64)))
    return _sigmoid_times(b, x, slope)


def _gelu(b: Body, x: ir.Value) -> ir.Value:
    """x · erfc(−x / √2) / 2, term by term: runtimes have Erf in float32 alone, and 1 + erf is nothing for x far below 0."""
    constant = lambda value: b.constant(value, np.float64)  # noqa: E731
    size = b.op("Abs", x)
    size = b.op("Where", b.op("Greater", size, constant(15)), constant(15), size)  # beyond, the tail counts nothing
    z = b.op("Mul", size, constant(math.sqrt(0.5)))
    inverse = b.op("Div", constant(1), b.op("Add", z, constant(3)))
    t = b.op("Sub", constant(1), b.op("Mul", constant(6), inverse))
    series = constant(_TAIL[-1])
    for coefficient in _TAIL[-2::-1]:
        series = b.op("Add", b.op("Mul", series, t), constant(coefficient))
    gauss = b.op("Exp", b.op("Mul", constant(-0.5), b.op("Mul", size, size)))
    tail = b.op("Mul", b.op("Mul", b.op("Mul", constant(0.5), inverse), series), gauss)
    below = b.op("Less", x, constant(0))
    phi = b.op("Where", below, tail, b.op("Sub", constant(1), tail))
    return b.op("Mul", _at_least(b, x, -15), phi)


_ACTIVATIONS = {Gate.SILU: _silu, Gate.GELU_TANH: _gelu_tanh, Gate.GELU: _gelu}
