"""Products of the target `onnx-stock` beyond MatMulNBits: static int8 activations, and columns in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.errors import UnsupportedError
from qcompiler.lower.edit import MICROSOFT, initializer, insert_before, name_of, operand, stored
from qcompiler.lower.external import INLINE_BYTES
from qcompiler.ops import SPECS, layout
from qcompiler.ops.formats import AffineFormat


def inputs_of(node: ir.Node) -> dict[str, ir.Value | None]:
    """A node's inputs by the names of its declaration; None where left out."""
    (spec,) = (spec for spec in SPECS.values() if spec.onnx_name == node.op_type)
    return {i.name: node.inputs[at] if at < len(node.inputs) else None for at, i in enumerate(spec.inputs)}


def _own(graph: ir.Graph, name: str, array: np.ndarray, beside: dict[str, int], kind: str) -> ir.Value:
    """An initializer of that name, made once (an exporter may have merged equal constants) and counted in `beside`, unless it
    is so small that it stays in the graph."""
    if name in graph.initializers:
        return graph.initializers[name]
    if array.nbytes > INLINE_BYTES:
        beside[kind] = beside.get(kind, 0) + array.nbytes
    return initializer(graph, name, array)


def read_bytes(value: ir.Value | None) -> int:
    """Size of an initializer, 0 unless some node reads it."""
    return stored(value).nbytes if value is not None and value.uses() else 0


def takes_static(format: AffineFormat) -> bool:
    """Whether stock ONNX Runtime has an integer product for static activations and this weight."""
    return format.bits == 8 and format.group == 0


def _insert(node: ir.Node, op: str, inputs: list[ir.Value | None], domain: str = "", **attributes: int) -> ir.Value:
    """A node before `node`; its one output."""
    new = ir.node(op, inputs, attributes=attributes, domain=domain)
    insert_before(node, [new])
    return new.outputs[0]


def edges_of(node: ir.Node) -> list[str]:
    """What the node does besides its product (`qcompiler.ops.linear_edges`), by the names of its declaration."""
    given = inputs_of(node)
    names = [name for name in ("norm", "residual") if given.get(name) is not None]
    return ["gate"] * bool(node.attributes.get_int("gate", 0)) + names


@dataclass
class StaticMatrix:
    """A weight as MatMulIntegerToFloat reads it: int8 `[k, n]`, a scale (and zero point) a column.

    uint8 activations with int8 weights are what ONNX Runtime has fast kernels for: on AVX-512 VNNI four times as fast as
    uint8 weights for a prompt, and int8 with int8 is slower than float. On x86 without VNNI these kernels saturate, unless
    the session's option `session.x64quantprecision` is 1, as our sessions have it.
    """

    values: ir.Value
    scales: ir.Value
    zeros: ir.Value | None

    @classmethod
    def of(cls, graph: ir.Graph, node: ir.Node, given: dict[str, ir.Value | None]) -> StaticMatrix:
        n, k, bits, group = (node.attributes.get_int(name) for name in ("n", "k", "bits", "group"))
        format = AffineFormat(bits, group, given["zeros"] is None)
        if not takes_static(format):
            raise UnsupportedError(
                f"node {node.name}: stock ONNX Runtime has no kernel for {format.label} with int8-static activations"
            )
        array = lambda name: stored(given[name]).numpy()  # noqa: E731
        base = name_of(given["codes"]).removesuffix("codes")
        codes = np.ascontiguousarray(layout.unpack_codes(array("codes"), n, k, bits).T)
        scales = layout.unpack_scales(array("scales"), n).astype(np.float32).reshape(n)
        zeros = None
        if given["zeros"] is not None:
            zeros = initializer(graph, f"{base}column_zeros", layout.unpack_zeros(array("zeros"), n, bits).reshape(n))
        values = initializer(graph, f"{base}columns_int8", codes)
        return cls(values, initializer(graph, f"{base}column_scales", scales), zeros)

    def bytes(self) -> dict[str, int]:
        return {"codes": read_bytes(self.values), "scales": read_bytes(self.scales), "zeros": read_bytes(self.zeros)}

    def product(
        self, graph: ir.Graph, node: ir.Node, given: dict[str, ir.Value | None], x: ir.Value, beside: dict[str, int]
    ) -> ir.Value:
        """x · Wᵀ (+ bias) before `node`; adds the bytes of scale and zero point to `beside`.

        The zero point moves by 128 to uint8. (Of a symmetric range, which ends at −127 in our ops, −128 is used here.)
        """
        base = name_of(given["activation_scale"]).removesuffix("activation_scale")
        scale = stored(given["activation_scale"]).numpy().reshape(())
        zero = 0 if given["activation_zero"] is None else int(stored(given["activation_zero"]).numpy()[0])
        s = _own(graph, f"{base}input_scale", scale, beside, "activations")
        z = _own(graph, f"{base}input_zero_{zero + 128}", np.array(zero + 128, np.uint8), beside, "activations")
        q = _insert(node, "QuantizeLinear", [x, s, z])
        inputs = [q, self.values, s, self.scales, z, self.zeros, given["bias"]]
        while inputs[-1] is None:
            inputs.pop()
        new = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)
        new.metadata_props.update(node.metadata_props)
        insert_before(node, [new])
        return new.outputs[0]


def without_outliers(
    graph: ir.Graph, node: ir.Node, given: dict[str, ir.Value | None], beside: dict[str, int]
) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
    """x with 0 in the outlier columns, and what adds their product to that of the rest.

    Their float32 weights and indices are put into the graph; their bytes are added to `beside`.
    """
    x, n, k = operand(node, 0), node.attributes.get_int("n"), node.attributes.get_int("k")
    columns = stored(given["columns"]).numpy()
    if not columns.size:
        return x, lambda y: y
    base = name_of(given["outliers"]).removesuffix("outliers")
    keep = np.ones(k, np.float32)
    keep[columns] = 0
    weights = layout.unpack_outliers(stored(given["outliers"]).numpy(), n).astype(np.float32).T
    arrays = {"kept_columns": keep, "outlier_columns": columns, "outlier_weights": np.ascontiguousarray(weights)}
    held = {name: _own(graph, f"{base}{name}", array, beside, "outliers") for name, array in arrays.items()}

    def add(y: ir.Value) -> ir.Value:
        taken = _insert(node, "Gather", [x, held["outlier_columns"]], axis=-1)
        return _insert(node, "Add", [y, _insert(node, "MatMul", [taken, held["outlier_weights"]])])

    return _insert(node, "Mul", [x, held["kept_columns"]]), add
