"""Models beyond 2 GB, where protobuf ends: written, opened again and run without ever being held twice in memory."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.lower.external import ALIGNMENT, LARGE, LARGE_ALIGNMENT, check_saved, external_bytes, save
from qcompiler.runtime.bench import peak_rss_bytes

ROWS, WIDTH, COUNT = 2**19, 257, 5  # five tables of 514 MiB, 2.5 GiB together
GIB = 2**30


def table(index: int) -> np.ndarray:
    """Any whole number up to 2^24 is exact in float32: each place of each table has a value of its own."""
    row = np.arange(ROWS, dtype=np.float32)[:, None] * np.float32(4)
    return row + (np.arange(WIDTH, dtype=np.float32) % 4)[None] + np.float32(index * 2**21)


def lookups() -> ir.Model:
    """Rows of every table, by index; the tables are made only while they are written."""
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    nodes, tables, outputs = [], [], []
    for index in range(COUNT):
        name = f"table.{index}"
        tensor = ir.LazyTensor(functools.partial(_made, index), dtype=ir.DataType.FLOAT, shape=ir.Shape([ROWS, WIDTH]), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        # a tensor of a few hundred bytes in between, so that the alignment has something to do
        odd = np.full(WIDTH, index, np.float32)
        float32 = ir.TensorType(tensor.dtype)
        offset = ir.Value(name=f"offset.{index}", const_value=ir.tensor(odd), shape=ir.Shape([WIDTH]), type=float32)
        rows = ir.node("Gather", [value, ids])
        added = ir.node("Add", [rows.outputs[0], offset])
        added.outputs[0].name, added.outputs[0].type = f"rows.{index}", ir.TensorType(ir.DataType.FLOAT)
        nodes += [rows, added]
        tables += [value, offset]
        outputs.append(added.outputs[0])
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=tables, opset_imports={"": 21}, name="lookups")
    return ir.Model(graph, ir_version=10)


def _made(index: int) -> ir.Tensor:
    return ir.tensor(table(index))


@pytest.mark.slow
def test_more_than_two_gigabytes_are_written_and_run(tmp_path: Path) -> None:
    model = lookups()
    size = external_bytes(model)
    assert size > 2.5 * GIB
    if shutil.disk_usage(tmp_path).free < size + GIB:
        pytest.skip(f"needs {size / GIB:.1f} GiB of disk")
    before = peak_rss_bytes()
    with open(tmp_path / "model.onnx.data", "wb") as data:
        saved = save(model, tmp_path / "model.onnx", data, "model.onnx.data")
    after = peak_rss_bytes()
    # one table and its bytes, not all of them
    assert before is None or after - before < 1.5 * GIB
    assert saved.data_bytes == size == (tmp_path / "model.onnx.data").stat().st_size
    assert saved.graph_bytes < LARGE
    assert [t.name for t in saved.tensors] == [f"{kind}.{i}" for i in range(COUNT) for kind in ("table", "offset")]
    assert saved.tensors[-1].offset > 2 * GIB
    check_saved(tmp_path / "model.onnx", saved)
    for tensor in saved.tensors:
        assert tensor.offset % (LARGE_ALIGNMENT if tensor.bytes >= LARGE else ALIGNMENT) == 0

    opened = ir.load(tmp_path / "model.onnx").graph.initializers
    for placed in saved.tensors:
        external = opened[placed.name].const_value
        assert isinstance(external, ir.ExternalTensor)
        assert (external.offset, external.length) == (placed.offset, placed.bytes)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([0, 1, ROWS // 2 + 7, ROWS - 1])
    for index, found in enumerate(session.run(None, {"ids": ids})):
        expected = 4.0 * ids[:, None] + np.arange(WIDTH) % 4 + index * 2**21 + index
        np.testing.assert_array_equal(found, expected.astype(np.float32))
