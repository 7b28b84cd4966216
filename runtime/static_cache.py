"""Caches of a fixed size: past and present as one buffer that is written in place, so that a step has the same shapes every time.

    before   past [1, heads, p, dim] ─▶ cat(past, new) ─▶ present [1, heads, p + n, dim]     p: sym_size(past)
    after    past [1, heads, capacity, dim] ─▶ index_copy_(past, filled + arange(n), new)    filled: a tensor, int64 []

Every length in the graph is a sum of p, n and a number. Where p + n is a size it becomes the buffer's; where p is a number that
positions are computed with it becomes the tensor `filled`. What lies behind the filled part then goes through the graph as well:
it stays on its own places of the axis, and counts for nothing where the axis is summed over, since softmax and attention get a
mask of what is filled. A graph with any other use of these axes is left as it is, and the reason names the node.

A tensor, not a number: a graph that was captured on a GPU is replayed with another length in it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from qcompiler.runtime import static_ops as ops
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.static_ops import packet

aten = torch.ops.aten
_END = 2**63 - 1
CPU = torch.device("cpu")


class Refused(Exception):
    """This graph keeps a growing cache; the message says why."""


@dataclass(frozen=True)
class StaticProgram:
    """A decoder's program with a cache in place.

    Attributes:
        module: called with tokens `[1, n]`, filled `[]` (int64) and then a tensor for each of `pasts`; gives the tuple of
            `outputs`.
        pasts: names of the cache's inputs: buffers with room for `capacity` positions, written in place; states as they are.
        presents: the name of what comes out of each.
        outputs: names: the logits, and the presents of states.
        limit: the largest capacity that the graph's own tables have room for, None where it has none.
    """

    module: GraphModule
    pasts: tuple[str, ...]
    presents: tuple[str, ...]
    outputs: tuple[str, ...]
    limit: int | None


def static_program(module: GraphModule, artifact: Artifact, device: torch.device = CPU) -> StaticProgram:
    """Rewrite a copy of an artifact's loaded program, its inputs and outputs those of the manifest by position.

    Args:
        module, artifact: the program, and the manifest of it.
        device: where the program is; positions are made there.

    Raises:
        Refused: the graph is not of the form above; `module` is as it was.
    """
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    results = graph.graph_copy(module.graph, copies)
    graph.output(results)
    return _Edit(GraphModule(module, graph), artifact, device).result()


class _Edit:
    def __init__(self, module: GraphModule, artifact: Artifact, device: torch.device) -> None:
        self.module, self.graph, self.device = module, module.graph, device
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        if artifact.cache is None or len(placeholders) != len(artifact.inputs):
            raise Refused("the program's inputs are not those of the manifest")
        self.infos = dict(zip(placeholders, artifact.inputs, strict=True))
        roles = {info.role: node for node, info in self.infos.items()}
        self.tokens = roles["tokens"]
        self.states = {state.past: state.present for state in artifact.cache.states}
        self.presents = dict(artifact.cache.pairs())
        self.outputs = [info.name for info in artifact.outputs]
        self.logits = next(info.name for info in artifact.outputs if info.role == "logits")
        self.limit: int | None = None
        self.new = _expr(self.tokens.meta["val"].shape[-1])
        self.axis: dict[Node, int] = {}
        self.masked: set[Node] = set()  # zero on every place that is not filled
        self.masks: dict[Any, Node] = {}
        for node, info in self.infos.items():
            if info.role in ("past_key", "past_value") or info.name in self.states:
                self._find_axis(node, info.name)
        self.growing = list(self.axis)
        self.pasts = {_expr(node.meta["val"].shape[axis]) for node, axis in self.axis.items()}
        if any(len(past.free_symbols) != 1 or past.free_symbols & self.new.free_symbols for past in self.pasts):
            raise Refused("the lengths of past and new tokens are not free of each other")
        self._begin()

    def _find_axis(self, node: Node, name: str) -> None:
        free = [i for i, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)]
        if name in self.states and not free:
            return
        if len(free) != 1 or name in self.states:
            raise Refused(f"{name} has the shape {list(node.meta['val'].shape)}, expected keys and values with one free axis")
        self.axis[node] = free[0]

    def _begin(self) -> None:
        """Nodes that everything else is made of: capacity and number of new tokens (int), filled, positions (tensors)."""
        last = [*self.infos][-1]
        with self.graph.inserting_after(last):
            self.filled = self.graph.placeholder("filled")
        anchor = self.filled.next
        with self.graph.inserting_before(anchor):
            call = self.graph.call_function
            self.count = call(aten.sym_size.int, (self.tokens, 1))
            # Without keys and values nothing reads it, and the text is as long as its new tokens.
            first = self.growing[0] if self.growing else None
            self.capacity = call(aten.sym_size.int, (first, self.axis[first])) if first is not None else self.count
            made: Any = {"device": self.device, "dtype": torch.int64}
            self.positions = call(aten.add.Tensor, (call(aten.arange.default, (self.count,), made), self.filled))
            everywhere = call(aten.arange.default, (self.capacity,), made)
            self.valid = call(aten.lt.Tensor, (everywhere, call(aten.add.Tensor, (self.filled, self.count))))
            for node, info in self.infos.items():
                if info.role in ("positions", "mask", "token_types"):
                    node.replace_all_uses_with(self._given(node, info.role))

    def _given(self, node: Node, role: str) -> Node:
        """An input that follows from how much is filled."""
        call, val = self.graph.call_function, node.meta["val"]
        shape = [size if isinstance(size, int) else 1 for size in val.shape[:-1]]
        if role == "positions":
            new = call(aten.expand.default, (self.positions, [*shape, self.count]))
        elif role == "mask":
            new = call(aten.to.dtype, (call(aten.expand.default, (self.valid, [*shape, self.capacity])), val.dtype))
        else:
            made: Any = {"device": self.device, "dtype": val.dtype}
            new = call(aten.zeros.default, ([*shape, self.count],), made)
        new.meta["val"] = val
        if role == "mask":
            self.axis[new] = val.dim() - 1
        return new

    def result(self) -> StaticProgram:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._visit(node)
        output = self.graph.output_node()
        values = dict(zip(self.outputs, _flat(output.args[0]), strict=True))
        order = [node for node, info in self.infos.items() if node in self.growing or info.name in self.states]
        for node in self.growing:
            past = self.infos[node].name
            written = values[self.presents[past]]
            if not isinstance(written, Node) or written.target is not aten.index_copy_.default or written.args[0] is not node:
                raise Refused(f"{self.presents[past]} is not {past} with the new tokens behind it")
        kept = [self.logits, *(self.states[self.infos[n].name] for n in order if self.infos[n].name in self.states)]
        output.args = (tuple(values[name] for name in kept),)
        self._finish(order)
        pasts = tuple(self.infos[node].name for node in order)
        return StaticProgram(self.module, pasts, tuple(self.presents[name] for name in pasts), tuple(kept), self.limit)

    def _finish(self, order: list[Node]) -> None:
        """Arguments in their new order; nodes that nothing needs any more leave, writes stay."""
        for node in list(self.infos):
            if node is not self.tokens and node not in order:
                self.infos.pop(node)
                if node.users:
                    raise Refused(f"the input {node.name} is still read by {next(iter(node.users)).name}")
                self.graph.erase_node(node)
        self.tokens.append(self.filled)
        for before, node in zip([self.filled, *order], order, strict=False):
            before.append(node)
        writes = aten.index_copy_.default
        self.graph.eliminate_dead_code(lambda node: node.is_impure() or node.target is writes)
        self.graph.set_codegen(torch.fx.graph.CodeGen())
        self.module = GraphModule(self.module, self.graph)

    # ---- one node

    def _visit(self, node: Node) -> None:
        name, val = packet(node), node.meta.get("val")
        if name in ops.CHECKS:
            self.graph.erase_node(node)
            return
        if not isinstance(val, (torch.Tensor, tuple, list)):
            self._length(node, val)
            return
        given = [source for source in node.all_input_nodes if self._touches(source)]
        axis = self._axis_of(val, node) if isinstance(val, torch.Tensor) else None
        if not given and axis is None:
            return
        if name == "cat" and self._write(node):
            return
        if any(source.op == "placeholder" for source in given):
            raise Refused(f"{_say(node)} reads a past cache, which only the concatenation with new tokens may")
        if name == "slice" and self._slice(node):
            return
        if axis is not None:
            self.axis[node] = axis
        handler = (
            self._factory if name in ops.FACTORIES else self._layout if name in ops.LAYOUT or name == "cat"
            else self._pointwise if name in ops.POINTWISE else self._product if name in ops.PRODUCTS
            else self._softmax if name in ops.SOFTMAX else self._attention if name in ops.ATTENTION
            else self._row_by_row if name in ops.ROW_BY_ROW else self._prefix if name in ops.PREFIX else None
        )  # fmt: skip
        if handler is None:
            raise Refused(f"{_say(node)} has cached positions on an axis, and nothing is known of what it does along it")
        handler(node)

    def _length(self, node: Node, val: Any) -> None:
        """One without the past in it may have been computed from some with it; those are looked at where they are used."""
        if not isinstance(val, (int, torch.SymInt)) or self._touches(node):
            return
        if any(self._touches(source) or source.op == "placeholder" and source in self.axis for source in node.all_input_nodes):
            expr = _expr(val)
            if expr != self.new and not expr.is_Integer:
                raise Refused(f"{_say(node)} computes {expr} from a length of past tokens")
            node.replace_all_uses_with(self.count if expr == self.new else int(expr))  # type: ignore[arg-type]

    def _touches(self, source: Node) -> bool:
        val = source.meta.get("val")
        if isinstance(val, torch.Tensor):
            return source in self.axis
        if isinstance(val, (tuple, list)):
            return any(isinstance(v, torch.Tensor) and self._axis_of(v, source) is not None for v in val)
        return source.op != "placeholder" and val is not None and bool(_symbols(val) & self._past_symbols())

    def _past_symbols(self) -> set[sympy.Symbol]:
        return {symbol for past in self.pasts for symbol in past.free_symbols}

    def _is_total(self, expr: Any) -> bool:
        return any(sympy.expand(expr - past - self.new) == 0 for past in self.pasts)

    def _axis_of(self, val: torch.Tensor, node: Node) -> int | None:
        """The axis of cached positions of a tensor, None where it has none."""
        found = []
        for index, size in enumerate(val.shape):
            expr = _expr(size)
            if expr.free_symbols & self._past_symbols():
                if not self._is_total(expr):
                    raise Refused(f"{_say(node)} has an axis of {expr}, expected all positions or none")
                found.append(index)
        if len(found) > 1:
            raise Refused(f"{_say(node)} has cached positions on {len(found)} axes")
        return found[0] if found else None

    def _size(self, value: Any, node: Node) -> Any:
        """A size: the capacity where it was the length of everything."""
        if not isinstance(value, Node) or not self._touches(value):
            return value
        if not self._is_total(_expr(value.meta["val"])):
            raise Refused(f"{_say(node)} has the size {value.meta['val']}, expected all positions")
        return self.capacity

    def _number(self, value: Any, node: Node) -> Any:
        """A number in arithmetic: a tensor of how many positions are filled, and what it is added to."""
        if not isinstance(value, Node) or isinstance(value.meta.get("val"), torch.Tensor) or not self._touches(value):
            return value
        expr = sympy.expand(_expr(value.meta["val"]))
        past = next((p for p in self.pasts if p.free_symbols & expr.free_symbols), sympy.Integer(0))
        of_past, rest = expr.coeff(past), sympy.expand(expr - expr.coeff(past) * past)
        of_new = rest.coeff(self.new) if self.new.free_symbols else sympy.Integer(0)
        constant = sympy.expand(rest - of_new * self.new)
        if not (of_past.is_Integer and of_new.is_Integer and constant.is_Integer):
            raise Refused(f"{_say(node)} computes with {expr}, expected a sum of lengths")
        with self.graph.inserting_before(node):
            call = self.graph.call_function
            made = self.filled if of_past == 1 else call(aten.mul.Tensor, (self.filled, int(of_past)))
            if of_new:
                made = call(aten.add.Tensor, (made, call(operator.mul, (self.count, int(of_new)))))
            return call(aten.add.Tensor, (made, int(constant))) if constant else made

    # ---- kinds of ops

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
        if int(axis) % val.dim() != self.axis[past] or _expr(new.meta["val"].shape[axis]) != self.new:
            raise Refused(f"{_say(node)} does not put the new tokens behind the past ones")
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
        size, out = _expr(val.shape[index]), _expr(made.shape[index])
        of_all, of_table = self._is_total(size), not size.free_symbols
        first = _expr(0 if start is None else _value(start))
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
        first, last = _expr(_value(start)), _expr(_value(end))
        if len(node.args) > 2 and node.args[2] != 1:
            raise Refused(f"{_say(node)} steps over positions")
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
            raise Refused(f"{_say(node)} counts from {first} to {last}, expected all positions or the new ones")

    def _layout(self, node: Node) -> None:
        sizes = ops.SIZES_AT.get(packet(node))
        if sizes is not None:
            listed: Any = node.args[sizes]
            node.args = (*node.args[:sizes], [self._size(s, node) for s in listed], *node.args[sizes + 1 :])
        left = [s for s in node.all_input_nodes if not isinstance(s.meta.get("val"), (torch.Tensor, tuple, list))]
        if any(s.meta.get("val") is not None and self._touches(s) for s in left):
            raise Refused(f"{_say(node)} takes a length of past tokens")
        if isinstance(node.meta["val"], torch.Tensor) and node not in self.axis and packet(node) != "getitem":
            raise Refused(f"{_say(node)} picks cached positions")
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
            raise Refused(f"{_say(node)} computes over cached positions as over the channels of a row")

    def _prefix(self, node: Node) -> None:
        """Sums of what comes before: what lies behind the filled part changes nothing in it."""

    def _product(self, node: Node) -> None:
        left, right = (node.args[at] for at in ops.PRODUCTS[packet(node)])
        assert isinstance(left, Node) and isinstance(right, Node)
        summed = left in self.axis and self.axis[left] == left.meta["val"].dim() - 1
        if summed and left not in self.masked:
            raise Refused(f"{_say(node)} sums over cached positions that no softmax has weighed")

    def _softmax(self, node: Node) -> None:
        source: Any = node.args[0]
        at: Any = node.args[1]
        dim = int(at) % source.meta["val"].dim()
        if self.axis.get(source) != dim:
            return
        if dim != source.meta["val"].dim() - 1:
            raise Refused(f"{_say(node)} weighs cached positions that are not its last axis")
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
            raise Refused(f"{_say(node)} is not attention of new tokens to all positions")
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


def _expr(size: Any) -> Any:
    """A size or length as an expression of the trace's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _symbols(value: Any) -> set[Any]:
    return set(value.node.expr.free_symbols) if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)) else set()


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg


def _flat(value: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(value))


def _say(node: Node) -> str:
    return f"{packet(node) or node.target} ({node.name})"
