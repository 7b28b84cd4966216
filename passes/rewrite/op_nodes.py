"""Nodes of our own ops: their arguments by name."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.ops.spec import SPECS, OpSpec
from qcompiler.ops.torch_ops import overload

_BY_TARGET: dict[Any, OpSpec] = {overload(name): spec for name, spec in SPECS.items()}


def spec_of(node: Node) -> OpSpec | None:
    """The declaration of the op that a node calls; None where it calls none of ours."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


def arguments(node: Node) -> dict[str, Any]:
    """Inputs (None where left out) and attributes of a node of ours, by name."""
    spec = _BY_TARGET[node.target]
    return dict(zip((*(i.name for i in spec.inputs), *spec.attributes), args(node), strict=True))


def change(node: Node, **values: Any) -> None:
    """Replace arguments of a node of ours by name."""
    given = arguments(node)
    unknown = values.keys() - given.keys()
    if unknown:
        raise KeyError(f"{node.target} has no argument {', '.join(sorted(unknown))}")
    node.args = tuple((given | values).values())
