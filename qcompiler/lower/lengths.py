"""What the graph computes from lengths alone: shape arithmetic, positions, masks; found by following its nodes.

Whatever a node computes from anything else is left unknown, so what is said here holds for every number of past and new
tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.lower.affine import ONE, Affine
from qcompiler.lower.constants import constant
from qcompiler.lower.length_forms import UNKNOWN_DIM, Field, Items, Known, Mask, Unknown, reshaped
from qcompiler.lower.length_rules import RULES

# Each row of the last axis is normalised by itself.
ROW_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")


class Knowledge:
    """What is known about the values of one graph: `values`, and the `shape` of every tensor.

    The lengths are the free axes of the graph's inputs, by name, and the input `past_length`.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.values: dict[ir.Value, Known] = {}
        self._shapes: dict[ir.Value, tuple[Affine, ...]] = {}
        self._axes: set[str] = set()
        for value in graph.inputs:
            self._axes.update(d.value for d in value.shape or () if isinstance(d, ir.SymbolicDim) and d.value)
            if value.name == "past_length":
                self.values[value] = Items((Affine.symbol("past_length"),))
        for node in graph:
            self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        if (shape := self._result_shape(node)) is not None:
            self._shapes[node.outputs[0]] = shape
        rule = RULES.get(node.op_type) if node.domain == "" else None
        if rule is None or len(node.outputs) != 1:
            return
        try:
            result = rule(self, node)
        except Unknown:
            return
        if result is not None:
            self.values[node.outputs[0]] = result

    # ---- reading operands

    def get(self, value: ir.Value | None) -> Known:
        if value is None:
            raise Unknown
        if (found := self.values.get(value)) is not None:
            return found
        array = constant(value)
        if array is None or array.size > 8 or array.ndim > 1 or array.dtype.kind not in "iub":
            raise Unknown
        if array.dtype.kind == "b":
            if array.size != 1 or not bool(array.reshape(-1)[0]):
                raise Unknown
            return Field((ONE,) * array.ndim, Mask(frozenset()))
        return Items(tuple(Affine(int(number)) for number in array.reshape(-1)), scalar=array.ndim == 0)

    def items(self, value: ir.Value | None) -> Items:
        found = self.get(value)
        if not isinstance(found, Items):
            raise Unknown
        return found

    def one(self, value: ir.Value | None) -> Affine:
        items = self.items(value)
        if len(items.values) != 1:
            raise Unknown
        return items.values[0]

    def numbers(self, value: ir.Value | None) -> list[int]:
        numbers = [item.number for item in self.items(value).values]
        if None in numbers:
            raise Unknown
        return [n for n in numbers if n is not None]

    def field(self, value: ir.Value | None) -> Field:
        """As a field; a scalar or a vector of one entry counts as one."""
        found = self.get(value)
        if isinstance(found, Field):
            return found
        if len(found.values) != 1:
            raise Unknown
        return Field(() if found.scalar else (ONE,), found.values[0])

    def dims(self, value: ir.Value | None) -> tuple[Affine, ...]:
        """The shape of any tensor, as far as it is numbers and lengths; `UNKNOWN_DIM` for what is neither."""
        if value is None:
            raise Unknown
        if (shape := self._shapes.get(value)) is not None:
            return shape
        if (found := self.values.get(value)) is not None:
            if isinstance(found, Field):
                return found.shape
            return () if found.scalar else (Affine(len(found.values)),)
        if value.shape is None:
            raise Unknown
        return tuple(self._dim(dim) for dim in value.shape)

    def _dim(self, dim: int | ir.SymbolicDim) -> Affine:
        if isinstance(dim, int):
            return Affine(dim)
        # A name is taken at its word only where an input has an axis of that name: others are expressions, or stale.
        return Affine.symbol(dim.value) if dim.value in self._axes else UNKNOWN_DIM

    def shape(self, value: ir.Value | None) -> tuple[Affine, ...] | None:
        """The shape of any tensor where all of it is known, else None."""
        try:
            dims = self.dims(value)
        except Unknown:
            return None
        return None if UNKNOWN_DIM in dims else dims

    def covers(self, value: ir.Value, shape: tuple[Affine, ...]) -> bool:
        """Whether an operand of `shape` broadcast with `value` gives the shape of `value`."""
        try:
            dims = self.dims(value)
        except Unknown:
            return False
        if len(shape) > len(dims):
            return False
        return all(x == ONE or x == y for x, y in zip(reversed(shape), reversed(dims), strict=False))

    def _result_shape(self, node: ir.Node) -> tuple[Affine, ...] | None:
        """The shape of what a node gives, for those that the exporter's fusions leave undeclared."""
        if node.op_type == "GroupQueryAttention":
            query, past = self.shape(node.inputs[0]), node.inputs[3]
            heads = node.attributes.get_int("num_heads")
            if query is None or past is None or past.shape is None or not isinstance(past.shape[3], int):
                return None
            return (*query[:-1], Affine(heads * past.shape[3]))
        if node.domain != "" or not node.inputs:
            return None
        source = self.shape(node.inputs[0])
        if node.op_type in ROW_NORMS:
            return source
        if node.op_type == "Transpose" and source is not None:
            return tuple(source[at] for at in node.attributes.get_ints("perm", range(len(source))[::-1]))
        if node.op_type != "Reshape":
            return None
        target = constant(node.inputs[1])
        if source is None or target is None:
            return None
        return reshaped(source, [int(n) for n in target], node.attributes.get_int("allowzero", 0) == 1)
