"""Function bodies beyond the cases of test_parity: several nodes, optimizer levels, long rows, scales far apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.ops import SPECS
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.linear_nbit import quantize_activations, random_range, random_weight, unpack
from qcompiler.ops.onnx_ops import attach_bodies, register, single_node_model
from qcompiler.ops.spec import DOMAIN, OPSET, Case
from qcompiler.runtime import library

register()
SPEC = SPECS["linear_nbit"]
LEVELS = onnxruntime.GraphOptimizationLevel


def linear(label: str, activation: Activation, x: np.ndarray, n: int, seed: int = 0, bias: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    tensors, attributes = random_weight(rng, n, x.shape[-1], AffineFormat.parse(label))
    inputs = {"x": x, **tensors, "bias": rng.standard_normal(n).astype(np.float32) if bias else None}
    inputs |= random_range(rng, tensors, attributes, activation, True)
    return Case(f"{label} {activation.label}", inputs, {**attributes, "activation": int(activation)})


def native(case: Case, isa: str | None = None) -> np.ndarray:
    inputs = {name: value for name, value in case.inputs.items() if value is not None}
    attributes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    return library.linear_nbit(**inputs, **attributes, isa=isa)


def without_library(model: ir.Model, x: np.ndarray, level: LEVELS = LEVELS.ORT_ENABLE_ALL) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(cases: Sequence[Case]) -> ir.Model:
    """The output of each node is the input of the next; every node has weights of its own."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", cases[0].attributes["k"]]))
    value, nodes, initializers = x, [], []
    for index, case in enumerate(cases):
        inputs: list[ir.Value | None] = [value]
        for declared in SPEC.inputs[1:]:
            array = case.inputs.get(declared.name)
            inputs.append(None if array is None else ir.Value(name=f"{declared.name}_{index}"))
            if array is not None:
                inputs[-1].const_value = ir.tensor(array, name=inputs[-1].name)
                initializers.append(inputs[-1])
        node = ir.node(SPEC.onnx_name, inputs, attributes=dict(case.attributes), domain=DOMAIN, name=f"node_{index}")
        value = node.outputs[0]
        value.name = f"y_{index}"
        nodes.append(node)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, DOMAIN: OPSET}
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports=opsets, name="chain")
    model = ir.Model(graph, ir_version=10)
    attach_bodies(model)
    return model


@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_ALL], ids=str)
def test_several_nodes_of_several_variants(level):
    """Each body is inlined more than once, and keeps its own loop."""
    block, token = Activation.INT8_BLOCK, Activation.INT8_TOKEN
    forms = [("int4-g32-sym", block), ("int8-row-asym", token), ("int4-g32-sym", block), ("int3-g64-asym", token)]
    forms += [("int8-row-asym", token), ("int2-row-sym", block), ("int4-g32-sym", block)]
    x = normal(3, 200)
    cases, expected = [], x
    for index, (label, activation) in enumerate(forms):
        # what goes in is in the case only to tell its shape
        case = linear(label, activation, np.zeros((3, expected.shape[1]), np.float32), 40 + 8 * index, seed=index)
        cases.append(case)
        expected = native(replace(case, inputs={**case.inputs, "x": expected}))
    model = chain(cases)
    assert len(model.functions) == 4
    np.testing.assert_array_equal(without_library(model, x, level), expected)


@pytest.mark.parametrize("label", ["int8-row-sym", "int8-row-asym"])
def test_long_rows_whose_sum_is_beyond_float32(label):
    case = linear(label, Activation.INT8_TOKEN, np.zeros((2, 3001), np.float32), 5)
    levels, _ = unpack(case.inputs, case.attributes)
    # in step with the first row and with the last, so that all the terms of their sums have one sign
    x = np.sign(levels[[0, -1]]) * np.random.default_rng(2).uniform(0.8, 1, (2, 3001)).astype(np.float32)
    case = replace(case, inputs={**case.inputs, "x": x.astype(np.float32)})
    a, _ = quantize_activations(case.inputs["x"], Activation.INT8_TOKEN)
    dot = a.astype(np.int64) @ levels.T.astype(np.int64)
    assert (np.abs(dot) > 2**24).any() and (dot.astype(np.float32) != dot).any()
    found = without_library(single_node_model(SPEC, case), case.inputs["x"])
    for isa in library.isas():
        np.testing.assert_array_equal(found, native(case, isa), err_msg=isa)


@pytest.mark.parametrize("activation", [Activation.INT8_TOKEN, Activation.INT8_BLOCK], ids=lambda a: a.label)
def test_scales_far_apart(activation):
    """Terms from the smallest float32 to the largest weights: rounded once a segment, as the kernels do."""
    rng = np.random.default_rng(3)
    x = normal(16, 1024) * np.exp2(rng.uniform(-40, 20, (16, 8, 1))).repeat(128, 2).reshape(16, 1024)
    x[1], x[2], x[3, ::2], x[4] = 0, 1e-44, 0, 1e-39
    case = linear("int4-g32-asym", activation, x.astype(np.float32), 64, bias=True)
    scales = np.exp2(rng.uniform(-20, 10, case.inputs["scales"].shape)).astype(np.float16)
    case = replace(case, inputs={**case.inputs, "scales": scales})
    found = without_library(single_node_model(SPEC, case), case.inputs["x"])
    np.testing.assert_array_equal(found, native(case))


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.label)
@pytest.mark.parametrize("label", ["int4-g32-sym", "int8-row-asym"])
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(label, activation, lead):
    case = linear(label, activation, normal(*lead, 160), 24, bias=True)
    found = without_library(single_node_model(SPEC, case), case.inputs["x"])
    assert found.shape == (*lead, 24)
    np.testing.assert_allclose(found, native(case), rtol=0, atol=0 if activation else 1e-4)


@pytest.fixture
def no_schema():
    """Without our schema, as for any tool that never heard of us."""
    schema = onnx.defs.get_schema(SPEC.onnx_name, OPSET, DOMAIN)
    onnx.defs.deregister_schema(SPEC.onnx_name, OPSET, DOMAIN)
    yield
    onnx.defs.register_schema(schema)


def test_the_checker_accepts_every_body(no_schema):
    models = {}
    for case in SPEC.cases():
        model = single_node_model(SPEC, case)
        model.graph.outputs[0].shape = ir.Shape([None] * case.inputs["x"].ndim)
        models[next(iter(model.functions))] = model
    static = 4 * 4 * 2 * (1 + 2)  # symmetric, and with a zero point with and without a bias
    # bits, groups, symmetric or not, activations, with and without a bias
    assert len(models) == 4 * 4 * 2 * 3 * 2 + static
    for model in models.values():
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
