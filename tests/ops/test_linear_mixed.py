"""`linear_mixed`: what the decomposition says of itself, and what it refuses. Parity of the backends is in test_parity."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.ops import SPECS, layout
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.linear_mixed import outlier_bytes, random_outliers
from qcompiler.ops.linear_nbit import quantize_activations, random_range, random_weight, unpack
from qcompiler.ops.onnx_ops import register, single_node_model
from qcompiler.ops.spec import Case
from qcompiler.ops.torch_ops import overload
from qcompiler.runtime import library

register()
SPEC = SPECS["linear_mixed"]
N, K = 37, 200


def call(case: Case, isa: str | None = None, threads: int = 1) -> np.ndarray:
    given = {name: value for name, value in case.inputs.items() if value is not None}
    sizes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    run = library.linear_mixed if "columns" in given else library.linear_nbit
    return run(**given, **sizes, isa=isa, threads=threads)


def session(case: Case, with_library: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if with_library:
        options.register_custom_ops_library(str(library.library_path()))
    content = ir.serde.serialize_model(single_node_model(SPEC, case)).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def made(activation: Activation, count: int = 5, rows: int = 4, label: str = "int8-row-sym", n: int = N, k: int = K) -> Case:
    """Activations whose outlier columns are 40 times as large as the others."""
    rng = np.random.default_rng(count)
    tensors, attributes = random_weight(rng, n, k, AffineFormat.parse(label))
    tensors |= random_range(rng, tensors, attributes, activation, True) | random_outliers(rng, n, k, count)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[:, tensors["columns"]] *= 40
    bias = rng.standard_normal(n).astype(np.float32)
    return Case("mixed", {"x": x, **tensors, "bias": bias}, {**attributes, "activation": int(activation)})


def changed(case: Case, **inputs: np.ndarray) -> Case:
    return Case(case.label, {**case.inputs, **inputs}, case.attributes)


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.label)
def test_without_columns_it_is_linear_nbit_to_the_bit(activation: Activation) -> None:
    case = made(activation, count=0)
    plain = Case("", {k: v for k, v in case.inputs.items() if k not in ("columns", "outliers")}, case.attributes)
    for isa in library.isas():
        np.testing.assert_array_equal(call(case, isa).view(np.uint32), call(plain, isa).view(np.uint32))
    np.testing.assert_array_equal(session(case, True).run(None, {"x": case.inputs["x"]})[0], call(plain))


def test_it_is_the_published_decomposition_with_a_fixed_set() -> None:
    """LLM.int8(): row-wise absmax without the outlier columns, their product in float beside it."""
    case = made(Activation.INT8_TOKEN)
    x, columns = case.inputs["x"], case.inputs["columns"]
    rest = np.delete(x, columns, axis=1)
    q, scale = quantize_activations(rest, Activation.INT8_TOKEN)
    levels, scales = unpack(case.inputs, case.attributes)
    low = (q.astype(np.float64) @ np.delete(levels, columns, axis=1).T) * scale[:, :1] * scales[:, 0]
    outliers = layout.unpack_outliers(case.inputs["outliers"], N).astype(np.float64)
    expected = low + x[:, columns].astype(np.float64) @ outliers.T + case.inputs["bias"]
    np.testing.assert_allclose(call(case), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_error_falls_as_columns_are_taken_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, K)).astype(np.float32)
    hot = np.sort(rng.choice(K, 6, replace=False))
    x[:, hot] *= 40
    weight = (rng.standard_normal((N, K)) * 0.05).astype(np.float32)
    scales = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.rint(weight / scales.astype(np.float32)), -127, 127).astype(np.int8)
    packed = {"codes": layout.pack_codes(codes, 8), "scales": layout.pack_scales(scales)}
    errors = []
    for count in (0, 3, 6):
        columns = np.sort(hot[:count]).astype(np.int32)
        outliers = layout.pack_outliers(weight[:, columns])
        y = library.linear_mixed(x, **packed, columns=columns, outliers=outliers, bits=8, group=0, n=N, k=K, activation=1)
        errors.append(np.square(y - x.astype(np.float64) @ weight.T).sum())
    assert errors[0] > errors[1] > 20 * errors[2]


def test_all_columns_in_float_leave_nothing_to_the_integers() -> None:
    case = made(Activation.INT8_TOKEN, count=K)
    x, outliers = case.inputs["x"], layout.unpack_outliers(case.inputs["outliers"], N)
    expected = x.astype(np.float64) @ outliers.astype(np.float64).T + case.inputs["bias"]
    np.testing.assert_allclose(call(case), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.label)
def test_rows_isas_and_threads_change_no_bit(activation: Activation) -> None:
    case = made(activation, rows=27, label="int4-g32-asym", n=1040, k=320)
    together = call(case)
    for isa in library.isas():
        np.testing.assert_array_equal(call(case, isa, threads=3), together)
        alone = [call(changed(case, x=case.inputs["x"][i : i + 1]), isa) for i in range(0, 27, 5)]
        np.testing.assert_array_equal(np.concatenate(alone), together[::5])


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.label)
def test_a_column_that_is_not_finite_makes_its_row_nan(activation: Activation) -> None:
    case = made(activation)
    clean, x, columns = call(case), case.inputs["x"].copy(), case.inputs["columns"]
    x[1, columns[0]], x[3, columns[-1]] = np.inf, np.nan
    dirty = changed(case, x=x)
    for isa in library.isas():
        y = call(dirty, isa)
        assert (y.view(np.uint32)[[1, 3]] == 0x7FC00000).all()
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    if activation is not Activation.FLOAT:
        body = session(dirty, False).run(None, {"x": x})[0]
        assert np.isnan(body[[1, 3]]).all()
        np.testing.assert_array_equal(body[[0, 2]], clean[[0, 2]])


BAD_COLUMNS = [
    ([0, 3, 3, 4, 5], "columns[2] is 3 after 3"),
    ([0, 4, 3, 5, 6], "columns[2] is 3 after 4"),
    ([0, 1, 2, 3, K], f"columns[4] is {K}, expected 0 <= column < k = {K}"),
    ([-1, 1, 2, 3, 4], "columns[0] is -1"),
]


@pytest.mark.parametrize("columns, words", BAD_COLUMNS, ids=lambda v: "" if isinstance(v, str) else str(v))
def test_bad_columns_are_refused_everywhere(columns: list[int], words: str) -> None:
    case = changed(made(Activation.INT8_TOKEN), columns=np.array(columns, np.int32))
    with pytest.raises(ValueError, match="column"):
        SPEC.reference(case.inputs, case.attributes)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        call(case)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch_call(case)
    with pytest.raises(Exception, match="LinearMixed node 'node'.*" + re.escape(words)):
        session(case, True).run(None, {"x": case.inputs["x"]})


def torch_call(case: Case) -> torch.Tensor:
    tensors = [None if case.inputs.get(i.name) is None else torch.from_numpy(case.inputs[i.name]) for i in SPEC.inputs]
    return overload("linear_mixed")(*tensors, *(case.attributes[name] for name in SPEC.attributes))


def test_tensors_of_another_shape_or_type_are_refused() -> None:
    case = made(Activation.INT8_TOKEN)
    short = case.inputs["outliers"][:, :4].copy()
    with pytest.raises(ValueError, match=r"outliers is float16 \[3, 4, 16\], expected float16 \[3, 5, 16\]"):
        call(changed(case, outliers=short))
    with pytest.raises(RuntimeError, match="columns are torch.int64"):
        torch_call(changed(case, columns=case.inputs["columns"].astype(np.int64)))
    with pytest.raises(Exception, match=re.escape("input 5 (outliers) is float16 [3, 4, 16], expected float16 [3, 5, 16]")):
        session(changed(case, outliers=short), True).run(None, {"x": case.inputs["x"]})
    with pytest.raises(ValueError, match="float16, which holds at most 65504; found 70000"):
        layout.pack_outliers(np.array([[7e4]], np.float32))


@pytest.mark.parametrize("label", ["int4-g32-sym", "int4-g32-asym"])
def test_export_from_torch_keeps_every_input_in_its_place(label: str) -> None:
    """An optional input lies between required ones: the translation must not shift them."""
    case = made(Activation.INT8_STATIC, label=label)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in SPEC.inputs[1:]:
                array = case.inputs.get(i.name)
                self.register_buffer(i.name, None if array is None else torch.from_numpy(array))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = [getattr(self, i.name) for i in SPEC.inputs[1:]]
            return overload("linear_mixed")(x, *held, *(case.attributes[name] for name in SPEC.attributes))

    x = torch.from_numpy(case.inputs["x"])
    program = torch.onnx.export(Module(), (x,), dynamo=True, verbose=False)
    (node,) = (node for node in program.model.graph if node.op_type == "LinearMixed")
    names = [None if value is None else value.name for value in node.inputs]
    assert names[1:] == [None if case.inputs.get(i.name) is None else i.name for i in SPEC.inputs[1:]]


def test_bytes_add_up() -> None:
    for n, count in [(16, 3), (37, 5), (1, 1), (33, 0)]:
        rng = np.random.default_rng(0)
        made = random_outliers(rng, n, 64, count)
        sizes = outlier_bytes(n, count)
        assert sum(sizes.values()) == sum(array.nbytes for array in made.values())
        assert sizes["outliers"] == count * (2 * n + 4) and sizes["padding"] >= 0
