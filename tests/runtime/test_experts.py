"""Products with experts in the op library: each row is what `linear_nbit` gives with its expert's matrix, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.ops import SPECS
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.linear_experts_nbit import expert_slice, random_experts
from qcompiler.ops.onnx_ops import register, single_node_model
from qcompiler.ops.spec import Case
from qcompiler.ops.torch_ops import overload
from qcompiler.runtime import library

register()
SPEC = SPECS["linear_experts_nbit"]


def case(rows: int, experts: int, n: int, k: int, label: str = "int4-g32-sym", activation=Activation.INT8_BLOCK) -> Case:
    rng = np.random.default_rng(rows)
    tensors, attributes = random_experts(rng, experts, n, k, AffineFormat.parse(label))
    x = rng.standard_normal((rows, k)).astype(np.float32)
    bias = rng.standard_normal((experts, n)).astype(np.float32)
    inputs = {"x": x, "expert": rng.integers(0, experts, rows), **tensors, "bias": bias}
    return Case(label, inputs, {**attributes, "activation": int(activation)})


def native(case: Case, **options) -> np.ndarray:
    attributes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    inputs = {name: value for name, value in case.inputs.items() if value is not None}
    return library.linear_experts_nbit(**inputs, **attributes, **options)


# Small matrices (an expert a piece), many experts, and few large ones (each cut into pieces).
SHAPES = [(9, 4, 40, 96), (40, 8, 64, 160), (6, 2, 1024, 1280), (300, 3, 96, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label, activation", [("int4-g32-sym", 2), ("int8-row-asym", 1), ("int3-g64-asym", 0)])
def test_each_row_is_that_of_its_own_matrix(shape, label, activation) -> None:
    made = case(*shape, label, Activation(activation))
    found = native(made, threads=1)
    sizes = {name: made.attributes[name] for name in ("bits", "group", "n", "k", "activation")}
    for expert in range(made.attributes["experts"]):
        rows = made.inputs["expert"] == expert
        part = expert_slice(made.inputs, made.attributes, expert)
        expected = library.linear_nbit(np.ascontiguousarray(made.inputs["x"][rows]), **part, **sizes)
        np.testing.assert_array_equal(found[rows], expected)
    for threads in (2, 3):
        np.testing.assert_array_equal(native(made, threads=threads), found)
    order = np.random.default_rng(1).permutation(len(found))
    inputs = {**made.inputs, "x": made.inputs["x"][order], "expert": made.inputs["expert"][order]}
    np.testing.assert_array_equal(native(replace(made, inputs=inputs), threads=2), found[order])


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    made = case(9, 2, 40, 96)
    expected = native(made)
    made.inputs["x"][4, 7] = np.inf
    found = native(made)
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(expected, 4, 0))


def session(made: Case, with_library: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if with_library:
        options.register_custom_ops_library(str(library.library_path()))
    content = ir.serde.serialize_model(single_node_model(SPEC, made)).SerializeToString()
    made_session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return made_session.run(None, {"x": made.inputs["x"]})[0]


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_index_that_is_no_expert_is_an_error_everywhere(wrong: int) -> None:
    made = case(5, 4, 16, 64)
    made.inputs["expert"][3] = wrong
    message = rf"expert\[3\] is {wrong}, expected 0 <= index < experts = 4"
    with pytest.raises(RuntimeError, match=message):
        native(made)
    with pytest.raises(RuntimeError, match=message):
        tensors = [torch.from_numpy(v) if (v := made.inputs.get(i.name)) is not None else None for i in SPEC.inputs]
        overload(SPEC.name)(*tensors, *(made.attributes[name] for name in SPEC.attributes))
    with pytest.raises(Exception, match=message):
        session(made, with_library=True)
    with pytest.raises(Exception, match="(?i)out of.* bounds|indices"):
        session(made, with_library=False)
    with pytest.raises(ValueError, match="of 4"):
        SPEC.reference(made.inputs, made.attributes)


def test_shapes_that_do_not_fit_are_told() -> None:
    made = case(5, 4, 16, 64)
    with pytest.raises(ValueError, match="expert is int64 .*expected int64"):
        native(replace(made, inputs={**made.inputs, "expert": made.inputs["expert"][:4]}))
    with pytest.raises(ValueError, match="codes"):
        native(replace(made, attributes={**made.attributes, "experts": 3}))
    with pytest.raises(Exception, match="input 2 .codes. is uint8"):
        session(replace(made, attributes={**made.attributes, "experts": 3}), with_library=True)
    with pytest.raises(Exception, match="input 1 .expert. has shape"):
        session(replace(made, inputs={**made.inputs, "expert": made.inputs["expert"][:4]}), with_library=True)
