"""Static int8 activations: ONNX's arithmetic through the op, the zero point's part cancelled, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.numerics import affine
from qcompiler.ops import SPECS, layout
from qcompiler.ops.activation_range import INPUTS, activation_offset, quantize_static, range_inputs
from qcompiler.ops.formats import BITS, GROUPS, LAYOUT_VERSION, Activation, AffineFormat
from qcompiler.ops.linear_nbit import random_range, random_weight, unpack
from qcompiler.ops.onnx_ops import register, single_node_model
from qcompiler.ops.spec import Case
from qcompiler.runtime import library

register()
SPEC = SPECS["linear_nbit"]
STATIC = {"activation": int(Activation.INT8_STATIC)}
FORMATS = [AffineFormat(*parts) for parts in itertools.product(BITS, GROUPS, (True, False))]


def native(tensors: dict, attributes: dict, x: np.ndarray, isa: str | None = None) -> np.ndarray:
    given = {name: value for name, value in tensors.items() if value is not None}
    sizes = {name: value for name, value in attributes.items() if name != "layout_version"}
    return library.linear_nbit(x, **given, **sizes, isa=isa)


def body(tensors: dict, attributes: dict, x: np.ndarray) -> np.ndarray:
    model = single_node_model(SPEC, Case("static", {"x": x, **tensors}, attributes))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def identity(k: int, scale: float, zero: int) -> tuple[dict, dict]:
    """W = 1 on the diagonal: the op gives what its activations became."""
    codes, scales, format = np.eye(k, dtype=np.int8), np.ones((k, 1), np.float16), AffineFormat(8, 0)
    tensors = {"codes": layout.pack_codes(codes, 8), "scales": layout.pack_scales(scales)}
    tensors |= range_inputs(scale, zero, codes, scales, None, format)
    return tensors, {"bits": 8, "group": 0, "n": k, "k": k, "layout_version": LAYOUT_VERSION, **STATIC}


def test_the_textbook_range_through_the_op() -> None:
    """[−1.5, 2.5] in 8 bits: S = 4 / 255, Z = −32; both ends, what lies beyond them, 0, and halves to even."""
    scale, zero = affine.scale_and_zero(torch.tensor(-1.5), torch.tensor(2.5), AffineFormat(8, 0, symmetric=False))
    assert scale.item() == np.float32(4 / 255) and zero.item() == -32
    s = np.float32(scale.item())
    x = np.array([-1.5, 2.5, 0, -9, 9, 1e30, -1e30, 1.5 * s, 2.5 * s, -0.5 * s], np.float32)
    levels = np.array([-128, 127, -32, -128, 127, 127, -128, -30, -30, -32])
    tensors, attributes = identity(len(x), scale.item(), int(zero.item()))
    expected = np.float64(s) * (levels + 32)
    found = [native(tensors, attributes, x[None], isa)[0] for isa in library.isas()]
    for y in [*found, body(tensors, attributes, x[None])[0]]:
        # the offset is a float32 of the size of S · Z
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-7 * float(s) * 160)
        assert y[2] == 0 and y[9] == 0


def test_without_a_zero_point_the_range_is_symmetric() -> None:
    tensors, attributes = identity(4, 0.5, 0)
    assert tensors["activation_zero"] is None and tensors["activation_offset"] is None
    x = np.array([[-1e9, 1e9, -63.5, 0.25]], np.float32)
    for isa in library.isas():
        np.testing.assert_array_equal(native(tensors, attributes, x, isa), [[-63.5, 63.5, -63.5, 0]])


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.label)
def test_a_row_of_zeros_gives_the_bias_to_the_bit(format: AffineFormat) -> None:
    rng = np.random.default_rng(format.bits * 1000 + format.group)
    tensors, attributes = random_weight(rng, 33, 300, format)
    tensors |= random_range(rng, tensors, attributes, Activation.INT8_STATIC, True)
    tensors["bias"] = rng.standard_normal(33).astype(np.float32)
    for isa in library.isas():
        y = native(tensors, attributes | STATIC, np.zeros((2, 300), np.float32), isa)
        np.testing.assert_array_equal(y, np.stack([tensors["bias"]] * 2))


@pytest.mark.parametrize("format", FORMATS[::3], ids=lambda f: f.label)
def test_the_offset_is_the_sum_of_the_weights(format: AffineFormat) -> None:
    rng = np.random.default_rng(0)
    tensors, attributes = random_weight(rng, 20, 200, format)
    levels, scales = unpack(tensors, attributes)
    weight = levels * np.repeat(scales, format.group or 200, axis=1)[:, :200].astype(np.float64)
    codes = layout.unpack_codes(tensors["codes"], 20, 200, format.bits)
    zeros = None if tensors["zeros"] is None else layout.unpack_zeros(tensors["zeros"], 20, format.bits)
    offset = activation_offset(np.float32(0.03), -77, codes, scales.astype(np.float16), zeros, format)
    size = 0.03 * 77 * np.abs(weight).sum(axis=1)
    assert offset.dtype == np.float32 and (np.abs(offset - 0.03 * 77 * weight.sum(axis=1)) <= 1e-6 * size).all()


def test_rounding_is_that_of_onnx() -> None:
    """quantize_static against QuantizeLinear and DequantizeLinear of ONNX Runtime, halves and far values among them."""
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(1)
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    values = [("x", TensorProto.FLOAT, [1, None]), ("s", TensorProto.FLOAT, []), ("z", TensorProto.INT8, [])]
    inputs = [helper.make_tensor_value_info(*value) for value in values]
    graph = helper.make_graph(nodes, "qdq", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for scale, zero in [(0.25, -128), (0.5, 127), (0.037, -32), (1e-3, 5)]:
        s = np.float32(scale)
        x = np.concatenate([rng.standard_normal(500), s * (np.arange(-300, 300) + 0.5), [1e38, -1e38, 0]])
        x = x.astype(np.float32)[None]
        (expected,) = session.run(None, {"x": x, "s": np.array(s), "z": np.array(zero, np.int8)})
        np.testing.assert_array_equal(s * quantize_static(x, s, zero), expected)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_row_that_is_not_finite_is_nan_and_stays_alone(asymmetric: bool) -> None:
    rng = np.random.default_rng(2)
    tensors, attributes = random_weight(rng, 20, 160, AffineFormat(4, 32))
    tensors |= random_range(rng, tensors, attributes, Activation.INT8_STATIC, asymmetric)
    x = rng.standard_normal((5, 160)).astype(np.float32)
    clean = native(tensors, attributes | STATIC, x)
    x[1, 3], x[2, 159], x[4, 0] = np.inf, -np.inf, np.nan
    results = [native(tensors, attributes | STATIC, x, isa) for isa in library.isas()]
    for y in [*results, body(tensors, attributes | STATIC, x)]:
        assert np.isnan(y[[1, 2, 4]]).all()
        np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize(
    "scale, zero, words",
    [(0.0, 0, "above 0"), (-1.0, 0, "above 0"), (np.nan, 0, "finite"), (1e-60, 0, "above 0"), (1.0, 128, "zero point .* is 128"),
     (1.0, -129, "is -129"), (1.0, 0.5, "whole number")],
)  # fmt: skip
def test_ranges_that_do_not_exist_are_refused(scale: float, zero: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        identity(4, scale, zero)


def test_a_range_of_the_wrong_kind_is_refused() -> None:
    tensors, attributes = identity(4, 0.5, 3)
    x = np.zeros((1, 4), np.float32)
    for name, without in (("activation_zero", "offset"), ("activation_offset", "zero")):
        with pytest.raises(RuntimeError, match=f"range.{without} is given without range.{name.removeprefix('activation_')}"):
            native(tensors | {name: None}, attributes, x)
    with pytest.raises(ValueError, match="without activation_scale"):
        native(tensors | {"activation_scale": None}, attributes, x)
    with pytest.raises(RuntimeError, match="range .* is null"):
        native(tensors | dict.fromkeys(INPUTS), attributes, x)
    with pytest.raises(RuntimeError, match="a static range is given and activation is 1"):
        native(tensors, attributes | {"activation": 1}, x)
    with pytest.raises(ValueError, match="activation_offset is float32 .*expected float32 .4."):
        native(tensors | {"activation_offset": np.zeros(5, np.float32)}, attributes, x)
