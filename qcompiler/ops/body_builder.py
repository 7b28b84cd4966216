"""Builds an ONNX function body node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ops.formats import TILE
from qcompiler.ops.spec import DOMAIN, OpSpec

STANDARD_OPSET = 21


def marker(overload: str) -> str:
    """Name of the attribute that ties a node to the body of its variant."""
    return f"variant_{overload.replace('-', '_')}"


class Nodes:
    """Records nodes; values are named so that a dump can be read.

    Args:
        prefix: of every name, so that a graph within a body shares no name with the body around it.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._constants: dict[tuple, ir.Value] = {}

    def add(self, node: ir.Node, name: str) -> ir.Value:
        """Append a node of one output, which is named after `name`."""
        number = len(self.nodes) + 1
        node.name, node.outputs[0].name = f"{self._prefix}body_{number}", f"{self._prefix}{name}_{number}"
        self.nodes.append(node)
        return node.outputs[0]

    def op(self, op_type: str, *inputs: ir.Value, **attributes) -> ir.Value:
        return self.add(ir.node(op_type, inputs, attributes=attributes), op_type.lower())

    def constant(self, value, dtype) -> ir.Value:
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(values, np.int64)

    def to_float(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.FLOAT)

    def to_double(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.DOUBLE)


class Body(Nodes):
    """The body of one variant of an op."""

    def __init__(self, attributes: Sequence[str], overload: str) -> None:
        super().__init__()
        self._attributes: dict[str, ir.Value] = {}
        self.attribute_names = [*attributes, marker(overload)]
        self.attribute(marker(overload))

    def attribute(self, name: str) -> ir.Value:
        """The function's integer attribute as an int64 tensor of shape [1]."""
        if name not in self._attributes:
            node = ir.Node("", "Constant", [], attributes=[ir.RefAttr("value_int", name, ir.AttributeType.INT)])
            self._attributes[name] = self.op("Reshape", self.add(node, name), self.ints(1))
        return self._attributes[name]

    def float_attribute(self, name: str) -> ir.Value:
        """The function's float attribute, a scalar."""
        if name not in self._attributes:
            node = ir.Node("", "Constant", [], attributes=[ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)])
            self._attributes[name] = self.add(node, name)
        return self._attributes[name]

    def tile_rows(self, columns: ir.Value) -> ir.Value:
        """The shape `[tiles, 16, columns]`; the unknown is the first, so that no tiles at all is not ambiguous."""
        return self.op("Concat", self.ints(-1, TILE), columns, axis=0)

    def shift_right(self, value: ir.Value, bits: int, dtype=np.uint8) -> ir.Value:
        return self.op("BitShift", value, self.constant(bits, dtype), direction="RIGHT") if bits else value

    def shift_left(self, value: ir.Value, bits: int) -> ir.Value:
        """Of bytes, whose bits all stay within the byte."""
        return self.op("Mul", value, self.constant(1 << bits, np.uint8))

    def field(self, value: ir.Value, shift: int, mask: int, dtype=np.uint8) -> ir.Value:
        return self.op("BitwiseAnd", self.shift_right(value, shift, dtype), self.constant(mask, dtype))

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: ir.Value, *shape: ir.Value) -> ir.Value:
        """Every dimension written out: -1 beside a dimension of size 0 would be ambiguous."""
        return self.op("Reshape", value, self.op("Concat", *shape, axis=0), allowzero=1)

    def fold(
        self, state: ir.DataType, start: ir.Value, scanned: Sequence[ir.Value], step: Callable[..., ir.Value]
    ) -> ir.Value:
        """`step(nodes, state, *slices) -> state` over the leading dimension of the `scanned` floats, in order.

        Args:
            state: type of the state.
            start: the state before the first slice.
            scanned: float tensors of one leading dimension.
            step: adds the nodes of one step; it may use nothing from outside.
        """
        inner = Nodes("step_")
        types = [state] + [ir.DataType.FLOAT] * len(scanned)
        inputs = [ir.Value(name=f"step_input_{i}", type=ir.TensorType(type_)) for i, type_ in enumerate(types)]
        output = step(inner, *inputs)
        output.type = ir.TensorType(state)
        graph = ir.Graph(inputs, [output], nodes=inner.nodes, name="step")
        return self.op("Scan", start, *scanned, body=graph, num_scan_inputs=len(scanned))

    def rows(self, scanned: Sequence[ir.Value], step: Callable[..., ir.Value]) -> ir.Value:
        """`step(builder, *slices) -> float` for each index of the leading dimension of `scanned`; the results, stacked.

        Unlike in `fold`, a step is a whole body: it may use the attributes and values from outside.
        """
        inner = _Step(self, "row_")
        types = [v.dtype for v in scanned if v.dtype is not None]
        assert len(types) == len(scanned), "a value that is scanned has no type"
        inputs = [ir.Value(name=f"row_input_{i}", type=ir.TensorType(type_)) for i, type_ in enumerate(types)]
        output = step(inner, *inputs)
        output.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(inputs, [output], nodes=inner.nodes, name="row")
        return self.op("Scan", *scanned, body=graph, num_scan_inputs=len(scanned))

    def fold_with(
        self, state: ir.DataType, start: ir.Value, scanned: Sequence[ir.Value], types: Sequence[ir.DataType],
        step: Callable[..., ir.Value],
    ) -> ir.Value:
        """As `fold`, over slices of several types, and a step is a whole body, as in `rows`: `step(builder, state, *slices)`."""
        inner = _Step(self, "step_")
        names = ["step_state", *(f"step_input_{i}" for i in range(len(scanned)))]
        inputs = [ir.Value(name=name, type=ir.TensorType(type_)) for name, type_ in zip(names, [state, *types], strict=True)]
        output = step(inner, *inputs)
        output.type = ir.TensorType(state)
        graph = ir.Graph(inputs, [output], nodes=inner.nodes, name="step")
        return self.op("Scan", start, *scanned, body=graph, num_scan_inputs=len(scanned))

    def function(self, spec: OpSpec, overload: str, inputs: Sequence[ir.Value], output: ir.Value) -> ir.Function:
        graph = ir.Graph(inputs, [output], nodes=self.nodes, opset_imports={"": STANDARD_OPSET})
        kind = lambda name: ir.AttributeType.FLOAT if spec.is_float(name) else ir.AttributeType.INT  # noqa: E731
        attributes = [ir.Attr(name, kind(name), spec.defaults.get(name)) for name in self.attribute_names]
        return ir.Function(DOMAIN, spec.onnx_name, overload, graph=graph, attributes=attributes)


class _Step(Body):
    """What runs for one row: its own nodes, the attributes of the body around it."""

    def __init__(self, outer: Body, prefix: str) -> None:
        Nodes.__init__(self, prefix)
        self._outer = outer

    def attribute(self, name: str) -> ir.Value:
        return self._outer.attribute(name)
