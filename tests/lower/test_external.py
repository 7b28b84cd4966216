"""The data file beside a model: where tensors lie, in which order, and what a damaged one is told by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.errors import GateError
from qcompiler.lower.external import ALIGNMENT, INLINE_BYTES, LARGE, LARGE_ALIGNMENT, Saved, check_saved, external_bytes, save

DATA = "model.onnx.data"
# Floats of the tensors that the sum below adds, in the order in which its nodes read them; listed otherwise in the graph.
SIZES = {"middle": 1000, "large": LARGE // 4, "small": 5, "odd": 77, "larger": LARGE // 4 + 1, "last": 100}
LISTED = ["last", "odd", "large", "unread", "small", "larger", "middle"]


def constant(name: str, count: int) -> ir.Value:
    array = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    value = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=value, shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.FLOAT))


def adding() -> ir.Model:
    """y = x + Σ (sum of each tensor), one node after the other."""
    values = {name: constant(name, SIZES.get(name, 300)) for name in LISTED}
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, total = [], x
    for name in SIZES:
        nodes.append(ir.node("ReduceSum", [values[name]], attributes={"keepdims": 1}))
        nodes.append(ir.node("Add", [total, nodes[-1].outputs[0]]))
        total = nodes[-1].outputs[0]
    total.name, total.shape, total.type = "y", ir.Shape([1]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [total], nodes=nodes, initializers=[values[n] for n in LISTED], opset_imports={"": 21}, name="sum")
    return ir.Model(graph, ir_version=10)


def saved(folder: Path, model: ir.Model) -> Saved:
    folder.mkdir(exist_ok=True)
    with open(folder / DATA, "wb") as data:
        return save(model, folder / "model.onnx", data, DATA)


def test_tensors_lie_aligned_in_the_order_of_first_use(tmp_path: Path) -> None:
    model = adding()
    expected = external_bytes(model)
    result = saved(tmp_path, model)
    # what no node reads comes last; small constants stay inside
    assert [t.name for t in result.tensors] == ["middle", "large", "odd", "larger", "last", "unread"]
    for tensor in result.tensors:
        assert tensor.offset % (LARGE_ALIGNMENT if tensor.bytes >= LARGE else ALIGNMENT) == 0
    ends = [t.offset + t.bytes for t in result.tensors]
    for end, tensor in zip(ends, result.tensors[1:], strict=False):
        assert 0 <= tensor.offset - end < LARGE_ALIGNMENT
    assert result.data_bytes == expected == ends[-1] == (tmp_path / DATA).stat().st_size
    assert result.graph_bytes == (tmp_path / "model.onnx").stat().st_size < LARGE
    assert result.alignment_bytes == result.data_bytes - sum(t.bytes for t in result.tensors)
    check_saved(tmp_path / "model.onnx", result)


def test_the_bytes_are_those_of_the_tensors_and_zeros_between(tmp_path: Path) -> None:
    result = saved(tmp_path, adding())
    content = (tmp_path / DATA).read_bytes()
    end = 0
    for tensor in result.tensors:
        assert not any(content[end : tensor.offset])
        end = tensor.offset + tensor.bytes
        array = np.random.default_rng(tensor.bytes // 4).standard_normal(tensor.bytes // 4).astype(np.float32)
        assert content[tensor.offset : end] == array.tobytes()


def test_onnxruntime_and_the_model_itself_read_what_was_written(tmp_path: Path) -> None:
    model = adding()
    expected = sum(float(np.sum(model.graph.initializers[name].const_value.numpy(), dtype=np.float64)) for name in SIZES)
    saved(tmp_path, model)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.zeros(1, np.float32)})
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert isinstance(model.graph.initializers["large"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(model.graph.initializers["odd"].const_value.numpy(), constant("odd", 77).const_value.numpy())


def test_constants_up_to_the_limit_stay_inside(tmp_path: Path) -> None:
    most = INLINE_BYTES // 4
    values = [constant("inside", most), constant("outside", most + 1)]
    outputs = [ir.Value(name=f"y{i}") for i in range(2)]
    nodes = [ir.node("Neg", [value], outputs=[output]) for value, output in zip(values, outputs, strict=True)]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="two")
    result = saved(tmp_path, ir.Model(graph, ir_version=10))
    assert [t.name for t in result.tensors] == ["outside"]
    again = ir.load(tmp_path / "model.onnx").graph.initializers
    assert isinstance(again["outside"].const_value, ir.ExternalTensor)
    assert not isinstance(again["inside"].const_value, ir.ExternalTensor)


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("first", "second"):
        result = saved(tmp_path / name, adding())
        files = [hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for file in ("model.onnx", DATA)]
        hashes.append((result, files))
    assert hashes[0] == hashes[1]


def test_tensors_of_subgraphs_are_written_too(tmp_path: Path) -> None:
    value = constant("inner", 500)
    float32 = ir.TensorType(ir.DataType.FLOAT)
    summed = ir.node("ReduceSum", [value], attributes={"keepdims": 0}, outputs=[ir.Value(name="s", type=float32)])
    branch = ir.Graph([], [summed.outputs[0]], nodes=[summed], initializers=[value], name="then")
    zero = ir.node("Constant", [], attributes={"value_float": 0.0}, outputs=[ir.Value(name="z", type=float32)])
    other = ir.Graph([], [zero.outputs[0]], nodes=[zero], name="else")
    choose = ir.Value(name="choose", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    chosen = ir.node("If", [choose], attributes={"then_branch": branch, "else_branch": other})
    chosen.outputs[0].name, chosen.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([choose], chosen.outputs, nodes=[chosen], opset_imports={"": 21}, name="outer")
    result = saved(tmp_path, ir.Model(graph, ir_version=10))
    assert [t.name for t in result.tensors] == ["inner"]
    check_saved(tmp_path / "model.onnx", result)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = constant("inner", 500).const_value.numpy().sum()
    assert session.run(None, {"choose": np.array(True)})[0] == pytest.approx(expected, rel=1e-4)


# ---- what goes wrong


def test_a_truncated_data_file_is_told_by_the_tensor_it_cuts(tmp_path: Path) -> None:
    result = saved(tmp_path, adding())
    cut = result.tensors[-2]
    with open(tmp_path / DATA, "r+b") as data:
        data.truncate(cut.offset + cut.bytes - 1)
    with pytest.raises(GateError, match=rf"{DATA}: {cut.offset + cut.bytes - 1} bytes, but tensor '{cut.name}' ends at"):
        check_saved(tmp_path / "model.onnx", result)


def test_a_tensor_that_was_not_saved_is_named(tmp_path: Path) -> None:
    result = saved(tmp_path, adding())
    other = adding()
    other.graph.initializers["odd"].name = "even"
    saved(tmp_path, other)
    with pytest.raises(GateError, match="tensor 'odd' was not saved"):
        check_saved(tmp_path / "model.onnx", result)


def test_a_tensor_elsewhere_is_named(tmp_path: Path) -> None:
    result = saved(tmp_path, adding())
    model = ir.load(tmp_path / "model.onnx")
    value = model.graph.initializers["odd"]
    there = value.const_value
    value.const_value = ir.ExternalTensor(
        DATA, there.offset + 64, there.length, there.dtype, shape=there.shape, name="odd", base_dir=tmp_path
    )
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(GateError, match=f"tensor 'odd' lies at {there.offset + 64}"):
        check_saved(tmp_path / "model.onnx", result)


def test_an_initializer_without_a_value_is_refused(tmp_path: Path) -> None:
    model = adding()
    model.graph.initializers["odd"].const_value = None
    with pytest.raises(GateError, match="initializer 'odd' of model.onnx has no value"):
        saved(tmp_path, model)
