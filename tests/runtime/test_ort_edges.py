"""Gate, residual and norm of LinearNBit and LinearVQ in ONNX Runtime: the kernels' bits, shapes, errors that name the node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.ops import SPECS, linear_nbit, linear_vq
from qcompiler.ops.formats import Activation, AffineFormat, VqFormat
from qcompiler.ops.linear_edges import Gate
from qcompiler.ops.onnx_ops import single_node_model
from qcompiler.ops.spec import Case
from qcompiler.runtime import library, library_vq
from tests.runtime.ort_models import session

VERSION = tuple(map(int, ort.__version__.split(".")[:2]))
OPS = {"linear_nbit": "LinearNBit", "linear_vq": "LinearVQ"}
by_op = pytest.mark.parametrize("op", OPS)


def case(op: str, rows: tuple[int, ...], n: int, k: int, **attributes: Any) -> Case:
    """Every edge; `attributes` replace its own, one of None is left out."""
    rng = np.random.default_rng(n)
    if op == "linear_nbit":
        tensors, own = linear_nbit.random_weight(rng, n, k, AffineFormat(4, 32, False))
    else:
        tensors, own = linear_vq.random_weight(rng, n, k, VqFormat(2, 16, 64, 128, 64))
    given = {**own, "activation": int(Activation.INT8_BLOCK), "gate": int(Gate.SILU), "epsilon": 1e-5, **attributes}
    edges = {
        "norm": rng.uniform(0.5, 2, k).astype(np.float32),
        "residual": rng.standard_normal((*rows, n // 2 if given["gate"] else n)).astype(np.float32),
    }
    x = rng.standard_normal((*rows, k)).astype(np.float32)
    return Case(op, {"x": x, **tensors, **edges}, {name: v for name, v in given.items() if v is not None})


def save(path: Path, call: Case, axes: list[Any] | None = None, fed: tuple[str, ...] = ("residual",)) -> Path:
    """A model with x and the tensors of `fed` as its inputs, and the rest of the case as constants."""
    model = single_node_model(SPECS[call.label], call, bodies=False)
    (node,) = model.graph
    names = axes or [f"d{i}" for i in range(call.inputs["x"].ndim - 1)]
    model.graph.inputs[0].shape = ir.Shape([*names, call.attributes["k"]])
    for value in (v for v in node.inputs if v is not None and v.name in fed):
        del model.graph.initializers[value.name]
        value.shape, value.const_value = ir.Shape([None] * call.inputs[value.name].ndim), None
        model.graph.inputs.append(value)
    ir.save(model, path)
    return path


def feeds(call: Case, *names: str) -> dict[str, np.ndarray]:
    return {name: call.inputs[name] for name in ("x", *names)}


def direct(call: Case) -> np.ndarray:
    function = library.linear_nbit if call.label == "linear_nbit" else library_vq.linear_vq
    attributes = {name: value for name, value in call.attributes.items() if name != "layout_version"}
    return function(**{name: a for name, a in call.inputs.items() if a is not None}, **attributes, threads=1)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@by_op
@pytest.mark.parametrize("rows", [(), (0,), (1,), (9,), (2, 3), (2, 0, 3)], ids=str)
def test_the_op_is_the_kernel(op: str, rows: tuple[int, ...], tmp_path: Path) -> None:
    call = case(op, rows, 96, 200)
    y = session(save(tmp_path / "m.onnx", call)).run(None, feeds(call, "residual"))[0]
    assert y.shape == (*rows, 48)
    same_bits(y, direct(call))


@by_op
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_sessions_threads_change_no_bit(op: str, threads: int, tmp_path: Path) -> None:
    for rows in (1, 70):
        call = case(op, (rows,), 1056, 640)
        y = session(save(tmp_path / f"{rows}.onnx", call), threads).run(None, feeds(call, "residual"))[0]
        same_bits(y, direct(call))


@by_op
def test_all_of_them_may_be_fed(op: str, tmp_path: Path) -> None:
    call = case(op, (3,), 64, 96)
    model = session(save(tmp_path / "m.onnx", call, fed=("residual", "norm")))
    same_bits(model.run(None, feeds(call, "residual", "norm"))[0], direct(call))


@pytest.mark.skipif(VERSION < (1, 24), reason="no shape inference before 1.24")
@by_op
def test_a_gate_halves_the_shape(op: str, tmp_path: Path) -> None:
    for gate, columns in ((Gate.NONE, 64), (Gate.GELU, 32)):
        path = save(tmp_path / f"{columns}.onnx", case(op, (2, 3), 64, 96, gate=int(gate)), ["batch", "sequence"])
        assert session(path).get_outputs()[0].shape == ["batch", "sequence", columns]


# ---- what does not fit is refused in words


@by_op
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate": 4}, "attribute 'gate' is 4, expected 0 (none), 1 (silu), 2 (gelu_tanh) or 3 (gelu)"),
        ({"gate": -1}, "attribute 'gate' is -1"),
        ({"gate": 1.0}, "attribute 'gate' is a float, expected an integer"),
        ({"epsilon": 1}, "attribute 'epsilon' is an integer, expected a float"),
        ({"epsilon": -1.0}, "attribute 'epsilon' is -1.000000, expected a finite number of at least 0"),
        ({"epsilon": float("inf")}, "attribute 'epsilon' is inf"),
    ],
    ids=str,
)
def test_bad_attributes(op: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(f"{OPS[op]} node 'node': {message}")):
        session(save(tmp_path / "m.onnx", case(op, (1,), 64, 96, **changes)))


@by_op
@pytest.mark.parametrize("n", [48, 40, 33])
def test_a_gate_needs_two_halves_of_whole_tiles(op: str, n: int, tmp_path: Path) -> None:
    message = f"attribute 'n' is {n} with gate 1, expected two halves of a multiple of 16 rows"
    with pytest.raises(Exception, match=re.escape(f"{OPS[op]} node 'node': {message}")):
        session(save(tmp_path / "m.onnx", case(op, (1,), n, 96)))


@by_op
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "fed"])
def test_a_norm_of_another_length(op: str, constant: bool, tmp_path: Path) -> None:
    call = case(op, (1,), 64, 96)
    bad = Case(op, {**call.inputs, "norm": np.ones(97, np.float32)}, call.attributes)
    index = 9 if op == "linear_nbit" else 7
    message = f"{OPS[op]} node 'node': input {index} (norm) is float [97], expected float [96] (k 96)"
    with pytest.raises(Exception, match=re.escape(message)):
        model = session(save(tmp_path / "m.onnx", bad, fed=("residual",) if constant else ("residual", "norm")))
        if not constant:  # a constant is refused before any run
            model.run(None, feeds(bad, "residual", "norm"))


@by_op
@pytest.mark.parametrize("shape", [(3, 64), (2, 32), (1, 3, 32), (32,), (96,)], ids=str)
def test_a_residual_of_another_shape(op: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    call = case(op, (3,), 64, 96)
    bad = Case(op, {**call.inputs, "residual": np.ones(shape, np.float32)}, call.attributes)
    index = 8 if op == "linear_nbit" else 6
    message = f"input {index} (residual) is float {list(shape)}, expected float [3, 32], the shape of the output"
    with pytest.raises(Exception, match=re.escape(f"{OPS[op]} node 'node': {message}")):
        session(save(tmp_path / "m.onnx", bad)).run(None, feeds(bad, "residual"))


@by_op
def test_an_epsilon_without_a_norm(op: str, tmp_path: Path) -> None:
    call = case(op, (1,), 64, 96)
    bad = Case(op, {**call.inputs, "norm": None}, call.attributes)
    index = 9 if op == "linear_nbit" else 7
    message = f"node 'node': input {index} (norm) is missing, and attribute 'epsilon' is 0.00001"
    with pytest.raises(Exception, match=re.escape(message)):
        session(save(tmp_path / "m.onnx", bad)).run(None, feeds(bad, "residual"))
