"""What each kind of op becomes where its cached positions lie in a buffer that is not filled to its end: see `static_cache`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from qcompiler.runtime import static_ops as ops
from qcompiler.runtime.static_lengths import Lengths, Refused, expression, say, value_of
from qcompiler.runtime.static_ops import packet

aten = torch.ops.aten
_END = 2**63 - 1


class Kinds(Lengths):
    """The handlers of nodes.

    Attributes:
        positions: the node of the new tokens' places, int64 `[n]`.
        valid: the node of what is filled, bool `[capacity]`.
        masked: nodes that are zero on every place that is not filled.
        masks: made so far, by what they were made of.
        limit: the least size of the graph's own tables of positions.
    """

    positions: Node
    valid: Node
    masked: set[Node]
    masks: dict[Any, Node]
    limit: int | None

    def _write(self, node: Node) -> bool:
        """cat(past, new) becomes a write into the buffer of the past; False for any other concatenation."""
        parts: Any = node.args[0]
        axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not (isinstance(parts, (list, tuple)) and len(parts) == 2 and isinstance(parts[0], Node)):
            return False
        past, new = parts
        if past.op != "placeholder" or past not in self.axis:
            return False
        val = node.meta["val"]
        if int(axis) % val.dim() != self.axis[past] or expression(new.meta["val"].shape[axis]) != self.new:
            raise Refused(f"{say(node)} does not put the new tokens behind the past ones")
        with self.graph.inserting_before(node):
            written = self.graph.call_function(aten.index_copy_.default, (past, self.axis[past], self.positions, new))
        written.meta["val"] = val
        self.axis[written] = self.axis[past]
        node.replace_all_uses_with(written)
        self.graph.erase_node(node)
        return True

    def _slice(self, node: Node) -> bool:
        """The places of the new tokens, of all positions or of a table; all positions of a table. False for any other slice."""
        given: list[Any] = [*node.args, *(0, 0, None, None, 1)[len(node.args) :]]
        source, dim, start, _, step = given
        val, made = source.meta["val"], node.meta["val"]
        index = int(dim) % val.dim()
        size, out = expression(val.shape[index]), expression(made.shape[index])
        of_all, of_table = self._is_total(size), not size.free_symbols
        first = expression(0 if start is None else value_of(start))
        first = first + size if first.is_negative else first
        if of_all and out == size:
            node.args = (source, dim, 0, _END)
            return False
        if step == 1 and (of_all or of_table) and out == self.new and first in self.pasts:
            with self.graph.inserting_before(node):
                chosen = self.graph.call_function(aten.index_select.default, (source, index, self.positions))
            chosen.meta["val"] = made
            node.replace_all_uses_with(chosen)
            self.graph.erase_node(node)
            return True
        if step == 1 and of_table and self._is_total(out) and first == 0:
            self.limit = min(self.limit or int(size), int(size))
            node.args = (source, dim, 0, self.capacity)
            return False
        return False

    def _factory(self, node: Node) -> None:
        name = packet(node)
        if name != "arange":
            self._layout(node)
            return
        start, end = ((0, node.args[0]) if len(node.args) == 1 else node.args[:2])
        first, last = expression(value_of(start)), expression(value_of(end))
        if len(node.args) > 2 and node.args[2] != 1:
            raise Refused(f"{say(node)} steps over positions")
        if first == 0 and self._is_total(last):
            node.target, node.args = aten.arange.default, (self.capacity,)
        elif sympy.expand(last - first - self.new) == 0:
            offset = self._number(start, node)
            with self.graph.inserting_before(node):
                new = self.graph.call_function(aten.arange.default, (self.count,), dict(node.kwargs))
                moved = self.graph.call_function(aten.add.Tensor, (new, offset))
            moved.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(moved)
            self.graph.erase_node(node)
        else:
            raise Refused(f"{say(node)} counts from {first} to {last}, expected all positions or the new ones")

    def _layout(self, node: Node) -> None:
        sizes = ops.SIZES_AT.get(packet(node))
        if sizes is not None:
            listed: Any = node.args[sizes]
            node.args = (*node.args[:sizes], [self._size(s, node) for s in listed], *node.args[sizes + 1 :])
        left = [s for s in node.all_input_nodes if not isinstance(s.meta.get("val"), (torch.Tensor, tuple, list))]
        if any(s.meta.get("val") is not None and self._touches(s) for s in left):
            raise Refused(f"{say(node)} takes a length of past tokens")
        if isinstance(node.meta["val"], torch.Tensor) and node not in self.axis and packet(node) != "getitem":
            raise Refused(f"{say(node)} picks cached positions")
        if any(source in self.masked for source in node.all_input_nodes):
            self.masked.add(node)

    def _pointwise(self, node: Node) -> None:
        args = tuple(self._number(arg, node) for arg in node.args)
        overload = getattr(node.target, "_overloadname", "")
        if overload == "Scalar" and args[1:2] != node.args[1:2]:
            node.target = node.target.overloadpacket.Tensor  # type: ignore[union-attr]
        node.args = args
        if packet(node) in ("mul", "mul_", "to", "dropout", "_to_copy", "float") and any(
            source in self.masked for source in node.all_input_nodes
        ):
            self.masked.add(node)

    def _row_by_row(self, node: Node) -> None:
        if self.axis.get(node) == node.meta["val"].dim() - 1:
            raise Refused(f"{say(node)} computes over cached positions as over the channels of a row")

    def _prefix(self, node: Node) -> None:
        """Sums of what comes before: what lies behind the filled part changes nothing in it."""

    def _product(self, node: Node) -> None:
        left, right = (node.args[at] for at in ops.PRODUCTS[packet(node)])
        assert isinstance(left, Node) and isinstance(right, Node)
        summed = left in self.axis and self.axis[left] == left.meta["val"].dim() - 1
        if summed and left not in self.masked:
            raise Refused(f"{say(node)} sums over cached positions that no softmax has weighed")

    def _softmax(self, node: Node) -> None:
        source: Any = node.args[0]
        at: Any = node.args[1]
        dim = int(at) % source.meta["val"].dim()
        if self.axis.get(source) != dim:
            return
        if dim != source.meta["val"].dim() - 1:
            raise Refused(f"{say(node)} weighs cached positions that are not its last axis")
        with self.graph.inserting_before(node):
            unfilled = self._memo("unfilled", lambda: self.graph.call_function(aten.logical_not.default, (self.valid,)))
            bounded = self.graph.call_function(aten.masked_fill.Scalar, (source, unfilled, float("-inf")))
        node.args = (bounded, *node.args[1:])
        self.masked.add(node)

    def _attention(self, node: Node) -> None:
        query, key = node.args[0], node.args[1]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
        assert isinstance(query, Node) and isinstance(key, Node)
        if causal or query in self.axis or self.axis.get(key) != key.meta["val"].dim() - 2:
            raise Refused(f"{say(node)} is not attention of new tokens to all positions")
        bounded = self._memo(mask, lambda: self._bounded(mask, node))
        if len(node.args) > 3:
            node.args = (*node.args[:3], bounded, *node.args[4:])
        else:
            node.kwargs = {**node.kwargs, "attn_mask": bounded}

    def _bounded(self, mask: Any, node: Node) -> Node:
        """The mask of an attention, with what is not filled masked too."""
        call = self.graph.call_function
        with self.graph.inserting_before(node):
            if mask is None:
                return call(aten.unsqueeze.default, (self.valid, 0))
            if mask.meta["val"].dtype == torch.bool:
                return call(aten.logical_and.default, (mask, self.valid))
            return call(aten.masked_fill.Scalar, (mask, call(aten.logical_not.default, (self.valid,)), float("-inf")))

    def _memo(self, key: Any, make: Any) -> Node:
        if key not in self.masks:
            self.masks[key] = make()
        return self.masks[key]
