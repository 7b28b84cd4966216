"""`qcompiler inspect model.onnx`: any ONNX file, without loading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.ops import SPECS, linear_edges
from qcompiler.ops.formats import Activation
from qcompiler.ops.packing import format_of
from qcompiler.ops.spec import DOMAIN
from qcompiler.report import tables
from qcompiler.report.tables import Column, Document, Table, Text

if TYPE_CHECKING:
    import onnx

ATTENTION = "GroupQueryAttention"


def inspect_onnx(path: Path) -> Document:
    """Op counts, initializers by type, inputs and outputs, and the nodes of our own domain with their formats."""
    model = _load(path)
    graphs = list(_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    initializers = _initializers(graphs)
    ours = [_our_node(node) for node in nodes if node.domain == DOMAIN]
    data = {
        "file": str(path),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "ops": dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        "initializers": initializers,
        "functions": [f"{f.domain}::{f.name}{'/' + f.overload if f.overload else ''}" for f in model.functions],
        "nodes": ours,
    }
    return Document("inspect-onnx", data, _blocks(data))


def _blocks(data: dict[str, Any]) -> list[Table | Text]:
    header = [
        f"IR version {data['ir_version']}, opsets {', '.join(f'{k} {v}' for k, v in data['opsets'].items())}",
        f"producer {data['producer'] or 'unknown'}, {sum(data['ops'].values()):,} nodes, "
        f"{len(data['functions'])} functions",
    ]
    for key in ("inputs", "outputs"):
        header += [f"{key[:-1]:<7} {v['name']}: {v['dtype']}[{', '.join(map(str, v['shape']))}]" for v in data[key]]
    blocks: list[Table | Text] = [
        Text(data["file"], header),
        Table("ops", (Column("op"), Column("count", tables.count, right=True)), list(data["ops"].items())),
        Table(
            "initializers",
            (
                Column("dtype"),
                Column("where"),
                Column("count", tables.count, right=True),
                Column("bytes", tables.count, right=True),
            ),
            [(i["dtype"], i["where"], i["count"], i["bytes"]) for i in data["initializers"]],
        ),
    ]
    if data["nodes"]:
        columns = (
            Column("node"),
            Column("op"),
            Column("shape", tables.shape, right=True),
            Column("format"),
            Column("activation"),
            Column("beside the product", dispensable=1),
        )
        rows = [
            (n["name"], n["op"], n["shape"], n["format"], n["activation"], ", ".join(n["edges"]) or None) for n in data["nodes"]
        ]
        blocks.append(Table("nodes of ours", columns, rows))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _load(path: Path) -> onnx.ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UnsupportedError(
            f"inspecting an ONNX file needs the package onnx ({error}); install qcompiler[compile]"
        ) from error
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        # Only the graph file: what lies in external files is neither needed nor trusted here.
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as an ONNX model: {error}") from error
    if not model.HasField("graph") or not model.ir_version:
        raise InputError(f"{path} is not an ONNX model: it has no graph")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside its nodes."""
    stack = [graph]
    while stack:
        current = stack.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _initializers(graphs: list[onnx.GraphProto]) -> list[dict[str, Any]]:
    """Count and bytes by element type and place; sizes from shapes, so nothing is read."""
    import onnx

    groups: dict[tuple[str, str], list[int]] = {}
    for graph in graphs:
        for tensor in graph.initializer:
            where = "external" if tensor.data_location == onnx.TensorProto.EXTERNAL else "inside"
            group = groups.setdefault((_dtype(tensor.data_type), where), [0, 0])
            group[0] += 1
            group[1] += _bytes(tensor)
    return [
        {"dtype": dtype, "where": where, "count": count, "bytes": size}
        for (dtype, where), (count, size) in sorted(groups.items(), key=lambda item: -item[1][1])
    ]


def _bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length" and entry.value.isdecimal():
            return int(entry.value)
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    from onnx_ir import DataType

    elements = 1
    for size in tensor.dims:
        elements *= size
    try:
        return int(-(-elements * DataType(tensor.data_type).bitwidth // 8))
    except (ValueError, TypeError):  # strings have no width
        return sum(len(text) for text in tensor.string_data)


def _dtype(number: int) -> str:
    import onnx

    names = {value: name for name, value in onnx.TensorProto.DataType.items()}
    return names.get(number, f"type {number}").lower()


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return {"name": value.name, "dtype": kind or "unknown", "shape": []}
    tensor = value.type.tensor_type
    shape = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    return {"name": value.name, "dtype": _dtype(tensor.elem_type), "shape": shape}


def _our_node(node: onnx.NodeProto) -> dict[str, Any]:
    attributes = {a.name: a.f if a.type == a.FLOAT else a.i for a in node.attribute}
    if node.op_type == ATTENTION:  # no weight, so neither shape nor format
        variant = node.overload.split("-") if node.overload else []
        said = {"name": node.name, "op": node.op_type, "variant": node.overload, "edges": variant, "attributes": attributes}
        return {**said, "shape": None, "format": None, "activation": None}
    return {
        "name": node.name,
        "op": node.op_type,
        "variant": node.overload,
        "shape": [attributes[key] for key in ("n", "k") if key in attributes],
        "format": _format(attributes, node),
        "activation": _activation(attributes),
        "edges": _edges(attributes, node),
        "attributes": attributes,
    }


def _format(attributes: dict[str, Any], node: onnx.NodeProto) -> str | None:
    present = _present(node)
    if present is None:
        return node.overload or None  # an op of another version: its variant is all that is known
    try:
        return format_of(attributes, present).label
    except (KeyError, ValueError):
        return node.overload or None


def _present(node: onnx.NodeProto) -> frozenset[str] | None:
    """Names of the inputs that are there; None of an op that this version does not know."""
    spec = next((spec for spec in SPECS.values() if spec.onnx_name == node.op_type), None)
    if spec is None:
        return None
    return frozenset(i.name for i, name in zip(spec.inputs, node.input, strict=False) if name)


def _edges(attributes: dict[str, Any], node: onnx.NodeProto) -> list[str]:
    """What the op does besides its product: `norm`, a gate, `residual`."""
    try:
        return linear_edges.words(attributes, _present(node) or frozenset())
    except (KeyError, ValueError):
        return []


def _activation(attributes: dict[str, Any]) -> str | None:
    try:
        return Activation(attributes["activation"]).label
    except (KeyError, ValueError):
        return None
