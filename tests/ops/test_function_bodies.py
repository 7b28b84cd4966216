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
from qcompiler.ops import linear_vq as vq
from qcompiler.ops.formats import Activation, AffineFormat, parse_weight_format
from qcompiler.ops.linear_nbit import quantize_activations, random_range, random_weight, unpack
from qcompiler.ops.onnx_ops import attach_bodies, register, single_node_model
from qcompiler.ops.spec import DOMAIN, OPSET, Case, OpSpec
from qcompiler.runtime import library, library_vq

register()
SPEC, VQ = SPECS["linear_nbit"], SPECS["linear_vq"]
LEVELS = onnxruntime.GraphOptimizationLevel


def linear(label: str, activation: Activation, x: np.ndarray, n: int, seed: int = 0, bias: bool = False) -> Case:
    rng, format = np.random.default_rng(seed), parse_weight_format(label)
    affine = isinstance(format, AffineFormat)
    tensors, attributes = (random_weight if affine else vq.random_weight)(rng, n, x.shape[-1], format)
    inputs = {"x": x, **tensors, "bias": rng.standard_normal(n).astype(np.float32) if bias else None}
    if affine:
        inputs |= random_range(rng, tensors, attributes, activation, True)
    return Case(f"{label} {activation.label}", inputs, {**attributes, "activation": int(activation)})


def spec_of(case: Case) -> OpSpec:
    return VQ if "centroids" in case.attributes else SPEC


def native(case: Case, isa: str | None = None) -> np.ndarray:
    inputs = {name: value for name, value in case.inputs.items() if value is not None}
    attributes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    return (library_vq.linear_vq if "centroids" in attributes else library.linear_nbit)(**inputs, **attributes, isa=isa)


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
        spec = spec_of(case)
        for declared in spec.inputs[1:]:
            array = case.inputs.get(declared.name)
            inputs.append(None if array is None else ir.Value(name=f"{declared.name}_{index}"))
            if array is not None:
                inputs[-1].const_value = ir.tensor(array, name=inputs[-1].name)
                initializers.append(inputs[-1])
        node = ir.node(spec.onnx_name, inputs, attributes=dict(case.attributes), domain=DOMAIN, name=f"node_{index}")
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
    forms += [("vq2d32-b32x128-g64", block), ("vq1d16-ballxall-row", block), ("vq2d32-b32x128-g64", block)]
    x = normal(3, 200)
    cases, expected = [], x
    for index, (label, activation) in enumerate(forms):
        # what goes in is in the case only to tell its shape
        case = linear(label, activation, np.zeros((3, expected.shape[1]), np.float32), 40 + 8 * index, seed=index)
        cases.append(case)
        expected = native(replace(case, inputs={**case.inputs, "x": expected}))
    model = chain(cases)
    assert len(model.functions) == 6
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


@pytest.mark.parametrize(
    "label,activation",
    [
        ("int4-g32-asym", Activation.INT8_TOKEN),
        ("int4-g32-asym", Activation.INT8_BLOCK),
        ("vq2d64-b16x256-g32", Activation.INT8_BLOCK),
        ("vq2d64-b16x128-row", Activation.INT8_BLOCK),
    ],
)
def test_scales_far_apart(label, activation):
    """Terms from the smallest float32 to the largest weights: rounded once a segment, as the kernels do."""
    rng = np.random.default_rng(3)
    x = normal(16, 1024) * np.exp2(rng.uniform(-40, 20, (16, 8, 1))).repeat(128, 2).reshape(16, 1024)
    x[1], x[2], x[3, ::2], x[4] = 0, 1e-44, 0, 1e-39
    case = linear(label, activation, x.astype(np.float32), 64, bias=True)
    scales = np.exp2(rng.uniform(-20, 10, case.inputs["scales"].shape)).astype(np.float16)
    case = replace(case, inputs={**case.inputs, "scales": scales})
    found = without_library(single_node_model(spec_of(case), case), case.inputs["x"])
    np.testing.assert_array_equal(found, native(case))


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.label)
@pytest.mark.parametrize("label", ["int4-g32-sym", "int8-row-asym"])
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(label, activation, lead):
    case = linear(label, activation, normal(*lead, 160), 24, bias=True)
    found = without_library(single_node_model(SPEC, case), case.inputs["x"])
    assert found.shape == (*lead, 24)
    np.testing.assert_allclose(found, native(case), rtol=0, atol=0 if activation else 1e-4)


@pytest.mark.parametrize("activation", vq.ACTIVATIONS, ids=lambda a: a.label)
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_with_codebooks(activation, lead):
    case = linear("vq2d16-b16x128-row", activation, normal(*lead, 160), 24, bias=True)
    found = without_library(single_node_model(VQ, case), case.inputs["x"])
    assert found.shape == (*lead, 24)
    np.testing.assert_allclose(found, native(case), rtol=0, atol=0 if activation else 1e-4)


@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL], ids=str)
@pytest.mark.parametrize("name", ["embedding_nbit", "embedding_vq"])
def test_an_embedding_has_no_rows_but_its_own(name, level):
    """Not those either that its last tile has room for; and a row before the first is not the first."""
    spec = SPECS[name]
    case = next(case for case in spec.cases() if case.attributes["n"] == 37)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    content = ir.serde.serialize_model(single_node_model(spec, case)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    ask = lambda row: session.run(None, {"indices": np.full((1,) * case.inputs["indices"].ndim, row)})[0]  # noqa: E731
    np.testing.assert_array_equal(ask(-37), ask(0))
    for row in (37, 47, 48, -38):
        with pytest.raises(Exception, match="out of data bounds"):
            ask(row)


@pytest.fixture
def no_schema():
    """Without our schemas, as for any tool that never heard of us."""
    schemas = [onnx.defs.get_schema(spec.onnx_name, OPSET, DOMAIN) for spec in SPECS.values()]
    for schema in schemas:
        onnx.defs.deregister_schema(schema.name, OPSET, DOMAIN)
    yield
    for schema in schemas:
        onnx.defs.register_schema(schema)


def test_the_checker_accepts_every_body(no_schema):
    models = {}
    for case in SPEC.cases():
        model = single_node_model(SPEC, case)
        model.graph.outputs[0].shape = ir.Shape([None] * case.inputs["x"].ndim)
        models[next(iter(model.functions))] = model
    static = 4 * 4 * 2 * (1 + 2)  # symmetric, and with a zero point with and without a bias
    # bits, groups, symmetric or not, activations, with and without a bias
    edges = (4 * 2 * 2 - 1) * 3  # gates, norm, residual; each in three formats
    assert len(models) == 4 * 4 * 2 * 3 * 2 + static + edges
    for model in models.values():
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize("name", ["linear_vq", "embedding_vq"])
def test_the_checker_accepts_every_body_of_codebooks(no_schema, name):
    spec, models = SPECS[name], {}
    for case in spec.cases():
        model = single_node_model(spec, case)
        rank = case.inputs[spec.inputs[0].name].ndim + (name == "embedding_vq")
        model.graph.outputs[0].shape = ir.Shape([None] * rank)
        models[next(iter(model.functions))] = model
    formats = len(list(vq.formats()))
    assert formats == 8 * 4  # dimensions and centroids, groups
    assert len(models) == formats if name == "embedding_vq" else len(models) >= 2 * formats
    for model in models.values():
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
