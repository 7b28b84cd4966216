"""Write a model with its tensors in one file beside it, laid out as the kernels read them.

Tensors lie back to back at multiples of 64 bytes, those of 1 MiB and more at multiples of 64 KiB, in the order in which the graph
first reads them. Nothing is ever serialised into the protobuf but the graph and its small constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import onnx_ir as ir

from qcompiler.errors import GateError
from qcompiler.lower.edit import name_of

INLINE_BYTES = 256  # constants up to this size stay in the graph: shapes, epsilons
ALIGNMENT, LARGE_ALIGNMENT, LARGE = 64, 64 * 1024, 1024 * 1024


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the data file."""

    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Saved:
    """What was written: every placed tensor, and the size of the two files."""

    tensors: tuple[Placed, ...]
    graph_bytes: int
    data_bytes: int

    @property
    def alignment_bytes(self) -> int:
        """Bytes of the data file that belong to no tensor."""
        return self.data_bytes - sum(t.bytes for t in self.tensors)


def _in_order(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers of the main graph and its subgraphs, by first use; those that no node reads last."""
    seen: set[int] = set()
    initializers = {id(v): v for graph in model.graphs() for v in graph.initializers.values()}
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and id(value) in initializers and id(value) not in seen:
                seen.add(id(value))
                yield value
    for key, value in initializers.items():
        if key not in seen:
            yield value


def _align(offset: int, size: int) -> int:
    step = LARGE_ALIGNMENT if size >= LARGE else ALIGNMENT
    return -(-offset // step) * step


def external_bytes(model: ir.Model) -> int:
    """Size of the data file that `save` would write."""
    offset = 0
    for value in _in_order(model):
        size = value.const_value.nbytes if value.const_value is not None else 0
        if size > INLINE_BYTES:
            offset = _align(offset, size) + size
    return offset


def save(model: ir.Model, path: Path, data: IO[bytes], data_name: str) -> Saved:
    """Write the tensors to `data`, then the graph to `path`; the model's tensors become references to the file.

    Args:
        model: its large constants are replaced by external tensors named relative to `path`.
        path: of the `.onnx` file; the data file lies in the same directory.
        data: open for writing at its start.
        data_name: file name of `data`.

    Raises:
        GateError: an initializer without a value.
    """
    placed: list[Placed] = []
    offset = 0
    for value in list(_in_order(model)):
        tensor = value.const_value
        if tensor is None:
            raise GateError(f"initializer {value.name!r} of {path.name} has no value")
        if tensor.nbytes <= INLINE_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        start = _align(offset, tensor.nbytes)
        data.write(b"\0" * (start - offset))
        cast(_Writing, tensor).tofile(_Plain(data))
        offset = start + tensor.nbytes
        name, shape = name_of(value), ir.Shape(tensor.shape.numpy())
        placed.append(Placed(name, start, tensor.nbytes))
        value.const_value = ir.ExternalTensor(
            data_name, start, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=path.parent
        )
    data.flush()
    ir.save(model, path)
    return Saved(tuple(placed), path.stat().st_size, offset)


class _Writing(Protocol):
    """What every tensor of onnx_ir has and its own protocol leaves out."""

    def tofile(self, file: Any) -> None:
        """Write the tensor's bytes."""


class _Plain:
    """A file that can be written and nothing else: no tensor then writes past Python, where a full disk has no errno.

    Tensors of torch hand over their own memory, those of numpy one copy at a time.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


def check_saved(path: Path, saved: Saved) -> None:
    """Re-open what was written and hold it against what should be there.

    Raises:
        GateError: a tensor that is missing, or lies elsewhere, or reaches beyond the end of its file.
    """
    model = ir.load(path)
    found = {
        v.name: v.const_value
        for graph in model.graphs()
        for v in graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    for tensor in saved.tensors:
        external = found.get(tensor.name)
        if external is None:
            raise GateError(f"{path.name}: tensor {tensor.name!r} was not saved")
        if (external.offset, external.length) != (tensor.offset, tensor.bytes):
            raise GateError(
                f"{path.name}: tensor {tensor.name!r} lies at {external.offset}+{external.length}, "
                f"expected {tensor.offset}+{tensor.bytes}"
            )
        end, size = tensor.offset + tensor.bytes, Path(external.path).stat().st_size
        if end > size:
            raise GateError(f"{Path(external.path).name}: {size} bytes, but tensor {tensor.name!r} ends at {end}")
