"""Cosines and sines of an ONNX graph in double precision: the number nearest to the true one, whoever computes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper

from qcompiler.lower.angles import widen_angles


def graph(kind: int) -> ir.Model:
    nodes = [helper.make_node(op, ["x"], [name], name=name) for op, name in (("Cos", "c"), ("Sin", "s"))]
    nodes.append(helper.make_node("Mul", ["c", "s"], ["y"]))
    info = lambda name: helper.make_tensor_value_info(name, kind, ["n"])  # noqa: E731
    made = helper.make_graph(nodes, "g", [info("x")], [info("y"), info("s")], value_info=[info("c")])
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_angles_are_rounded_once() -> None:
    model = graph(T.FLOAT)
    assert widen_angles(model) == 2
    assert [node.op_type for node in model.graph] == ["Cast", "Cos", "Cast", "Sin", "Cast", "Mul"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(4000, dtype=np.float32) * np.float32(0.37)
    product, sine = session.run(None, {"x": x})
    expected = [f(x.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin)]
    np.testing.assert_array_equal(sine, expected[1])
    np.testing.assert_array_equal(product, expected[0] * expected[1])


def test_what_is_wide_already_stays() -> None:
    model = graph(T.DOUBLE)
    assert widen_angles(model) == 0 and len(model.graph) == 3
