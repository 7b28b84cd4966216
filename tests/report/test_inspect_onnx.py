"""inspect of an ONNX file: everything but the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import InputError
from qcompiler.ops import SPECS
from qcompiler.ops.onnx_ops import single_node_model
from qcompiler.report.inspect_onnx import inspect_onnx


def stock(path: Path) -> Path:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    external = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[4, 8])
    external.data_location = TensorProto.EXTERNAL
    external.external_data.add(key="location", value="absent.data")
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "b"], ["y"]),
            helper.make_node("Add", ["y", "b"], ["y2"]),
            helper.make_node("If", ["c"], ["out"], then_branch=inner, else_branch=inner),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(np.zeros(2, np.float32), "b"), external],
    )
    onnx.save(helper.make_model(graph, producer_name="test"), path)
    return path


def test_stock_model(tmp_path: Path) -> None:
    data = inspect_onnx(stock(tmp_path / "m.onnx")).data
    assert data["ops"] == {"Add": 2, "Identity": 2, "If": 1}
    assert data["initializers"] == [
        {"dtype": "float16", "where": "external", "count": 1, "bytes": 64},
        {"dtype": "float", "where": "inside", "count": 1, "bytes": 8},
    ]
    assert data["inputs"] == [{"name": "x", "dtype": "float", "shape": ["batch", 2]}]
    assert data["outputs"] == [{"name": "out", "dtype": "float", "shape": ["batch", "?"]}]
    assert data["nodes"] == []


def test_our_nodes_show_their_format(tmp_path: Path) -> None:
    seen = set()
    for spec in SPECS.values():
        for case in list(spec.cases())[:60:7]:
            ir.save(single_node_model(spec, case), tmp_path / "m.onnx")
            data = inspect_onnx(tmp_path / "m.onnx").data
            (node,) = data["nodes"]
            assert node["format"] == case.label.split(" ")[0]
            assert node["shape"] == [case.attributes["n"], case.attributes["k"]]
            assert len(data["functions"]) == 1
            seen.add(node["format"])
    assert {format[:2] for format in seen} == {"in", "vq"} and len(seen) > 6


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model at all", b"\xff" * 100])
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        inspect_onnx(path)
    with pytest.raises(InputError, match="no such file"):
        inspect_onnx(tmp_path / "absent.onnx")
