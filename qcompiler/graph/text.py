"""A graph as canonical text: one line a node, the same in every process, and small to compare between passes.

layers.0.mlp.up_proj.weight: float32[512, 256] = parameter
layers.0.mlp.up_proj/linear: float32[1, s0, 512] = aten.linear(layers.0.norm/mul_1, layers.0.mlp.up_proj.weight)

A node is named by its module and its op, counted within that module alone, so that a node put in or taken out renames
nothing elsewhere. A constant has one line, before its first use, wherever its `get_attr` nodes stand. Symbolic sizes
are renamed in the order in which they appear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from qcompiler.graph.constants import attribute, has_attribute

_INT64_MAX = 2**63 - 1


def graph_text(module: GraphModule) -> str:
    """The canonical text of a graph; ends with a newline."""
    writer = _Writer(module)
    return "".join(f"{line}\n" for node in module.graph.nodes for line in writer.lines(node))


class _Writer:
    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.names = _names(module.graph.nodes)
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.shown: set[str] = set()

    def lines(self, node: Node) -> Iterator[str]:
        if node.op == "get_attr":
            return
        for constant in node.all_input_nodes:
            if constant.op == "get_attr" and constant.target not in self.shown:
                self.shown.add(str(constant.target))
                yield self._line(constant)
        yield self._line(node)

    def _line(self, node: Node) -> str:
        if node.op == "output":
            return f"output = {self.value(node.args[0])}"
        return f"{self.names[node]}: {self.type(self._described(node))} = {self._expression(node)}"

    def _described(self, node: Node) -> Any:
        if node.op == "get_attr" and has_attribute(self.module, str(node.target)):
            return attribute(self.module, str(node.target))
        return node.meta.get("val")

    def _expression(self, node: Node) -> str:
        if node.op == "placeholder":
            return "placeholder"
        if node.op == "get_attr":
            described = self._described(node)
            return "parameter" if isinstance(described, torch.nn.Parameter) else "buffer"
        target = f"call {node.target}" if node.op == "call_module" else op_name(node.target)
        arguments = [self.value(argument) for argument in node.args]
        arguments += [f"{key}={self.value(argument)}" for key, argument in sorted(node.kwargs.items())]
        return f"{target}({', '.join(arguments)})"

    def value(self, value: Any) -> str:
        """An argument: a node's name, a literal, or a list of these."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self.value(item)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            return f"{self.value(value.start)}:{self.value(value.stop)}:{self.value(value.step)}"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value).removeprefix("torch.")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        if value == _INT64_MAX and isinstance(value, int):
            return "end"
        return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    def type(self, value: Any) -> str:
        """`float32[1, s0, 256]`, `int`, or a list of these for an op with several results."""
        if isinstance(value, torch.Tensor):
            shape = ", ".join(str(size) if isinstance(size, int) else self._symbolic(size) for size in value.shape)
            return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.type(item) for item in value)})"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        return "?" if value is None else type(value).__name__

    def _symbolic(self, value: Any) -> str:
        expression = value.node.expr
        # By name within one expression: the order in which a set gives its members is not the same in every process.
        for symbol in sorted(expression.free_symbols, key=str):
            self.symbols.setdefault(symbol, sympy.Symbol(f"s{len(self.symbols)}", integer=True, positive=True))
        return str(expression.xreplace(self.symbols))


def op_name(target: Any) -> str:
    """`aten.linear`, `aten.add.Tensor`, `operator.add`, `torch.sym_max`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", str(target))
    module = "operator" if target in vars(operator).values() else getattr(target, "__module__", "") or ""
    return f"{module.removeprefix('_')}.{name}" if module else name


def module_path(node: Node) -> str:
    """Dotted path of the module whose code made the node; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(list(stack.values())))[0]) if stack else ""
    # What torch writes where an op belongs to no module, such as the size of an input.
    return "" if path.startswith("_empty_nn_module_stack") else path


def describe(node: Node) -> str:
    """`aten.gelu in layers.0.mlp.act`."""
    path = module_path(node)
    return f"{op_name(node.target)} in {path}" if path else f"{op_name(node.target)} ({node.name})"


def _names(nodes: Iterable[Node]) -> dict[Node, str]:
    names: dict[Node, str] = {}
    taken: set[str] = set()
    for node in nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            taken.add(str(node.target))
    for node in nodes:
        if node.op == "get_attr":
            continue
        for name in _candidates(node):
            if name not in taken:
                names[node] = name
                taken.add(name)
                break
    return names


def _candidates(node: Node) -> Iterator[str]:
    if node.op in ("placeholder", "output"):
        base = str(node.target)
    else:
        path = module_path(node)
        op = op_name(node.target).split(".")[1:2] or [str(node.target)]
        base = f"{path}/{op[0]}" if path else op[0]
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1
