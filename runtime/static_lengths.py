"""Lengths of a decoder's graph: which sizes and numbers hold past tokens, and what they become where the cache has a fixed size.

    p + n as a size      the buffer's capacity
    p as a number        the tensor `filled`

p the past tokens, n the new ones, as the symbols of the trace.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from qcompiler.runtime.static_ops import packet

aten = torch.ops.aten


class Refused(Exception):
    """This graph keeps a growing cache; the message says why."""


class Lengths:
    """A graph that is being rewritten, and its lengths.

    Attributes:
        module, graph: what is rewritten.
        new: n.
        pasts: p, of every input that has one; all mean the same.
        axis: of every node that has cached positions on an axis, which one.
        count, capacity: nodes that give n and the buffers' size, numbers.
        filled: the node of how many positions are filled, a tensor.
    """

    module: GraphModule
    graph: torch.fx.Graph
    new: Any
    pasts: set[Any]
    axis: dict[Node, int]
    count: Node
    capacity: Node
    filled: Node

    def _length(self, node: Node, val: Any) -> None:
        """One without the past in it may have been computed from some with it; those are looked at where they are used."""
        if not isinstance(val, (int, torch.SymInt)) or self._touches(node):
            return
        if any(self._touches(source) or source.op == "placeholder" and source in self.axis for source in node.all_input_nodes):
            expr = expression(val)
            if expr != self.new and not expr.is_Integer:
                raise Refused(f"{say(node)} computes {expr} from a length of past tokens")
            node.replace_all_uses_with(self.count if expr == self.new else int(expr))  # type: ignore[arg-type]

    def _touches(self, source: Node) -> bool:
        val = source.meta.get("val")
        if isinstance(val, torch.Tensor):
            return source in self.axis
        if isinstance(val, (tuple, list)):
            return any(isinstance(v, torch.Tensor) and self._axis_of(v, source) is not None for v in val)
        return source.op != "placeholder" and val is not None and bool(symbols_of(val) & self._past_symbols())

    def _past_symbols(self) -> set[sympy.Symbol]:
        return {symbol for past in self.pasts for symbol in past.free_symbols}

    def _is_total(self, expr: Any) -> bool:
        return any(sympy.expand(expr - past - self.new) == 0 for past in self.pasts)

    def _axis_of(self, val: torch.Tensor, node: Node) -> int | None:
        """The axis of cached positions of a tensor, None where it has none."""
        found = []
        for index, size in enumerate(val.shape):
            expr = expression(size)
            if expr.free_symbols & self._past_symbols():
                if not self._is_total(expr):
                    raise Refused(f"{say(node)} has an axis of {expr}, expected all positions or none")
                found.append(index)
        if len(found) > 1:
            raise Refused(f"{say(node)} has cached positions on {len(found)} axes")
        return found[0] if found else None

    def _size(self, value: Any, node: Node) -> Any:
        """A size: the capacity where it was the length of everything."""
        if not isinstance(value, Node) or not self._touches(value):
            return value
        if not self._is_total(expression(value.meta["val"])):
            raise Refused(f"{say(node)} has the size {value.meta['val']}, expected all positions")
        return self.capacity

    def _number(self, value: Any, node: Node) -> Any:
        """A number in arithmetic: a tensor of how many positions are filled, and what it is added to."""
        if not isinstance(value, Node) or isinstance(value.meta.get("val"), torch.Tensor) or not self._touches(value):
            return value
        expr = sympy.expand(expression(value.meta["val"]))
        past = next((p for p in self.pasts if p.free_symbols & expr.free_symbols), sympy.Integer(0))
        of_past, rest = expr.coeff(past), sympy.expand(expr - expr.coeff(past) * past)
        of_new = rest.coeff(self.new) if self.new.free_symbols else sympy.Integer(0)
        constant = sympy.expand(rest - of_new * self.new)
        if not (of_past.is_Integer and of_new.is_Integer and constant.is_Integer):
            raise Refused(f"{say(node)} computes with {expr}, expected a sum of lengths")
        with self.graph.inserting_before(node):
            call = self.graph.call_function
            made = self.filled if of_past == 1 else call(aten.mul.Tensor, (self.filled, int(of_past)))
            if of_new:
                made = call(aten.add.Tensor, (made, call(operator.mul, (self.count, int(of_new)))))
            return call(aten.add.Tensor, (made, int(constant))) if constant else made


def expression(size: Any) -> Any:
    """A size or length as an expression of the trace's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def symbols_of(value: Any) -> set[Any]:
    return set(value.node.expr.free_symbols) if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)) else set()


def value_of(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg


def say(node: Node) -> str:
    return f"{packet(node) or node.target} ({node.name})"
