"""Constants that a channel scale can be put into: how a graph reads them, and who else does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from qcompiler.graph.constants import storage_key
from qcompiler.graph.graph import Graph
from qcompiler.graph.text import module_path
from qcompiler.passes.analyse.fold_shapes import Sizes, run

aten = torch.ops.aten

# Moves elements and changes none of them.
MOVES = frozenset(
    {
        aten._unsafe_view.default, aten.alias.default, aten.broadcast_to.default, aten.clone.default,
        aten.contiguous.default, aten.detach.default,
        aten.expand.default, aten.flatten.using_ints, aten.lift_fresh_copy.default, aten.mT.default, aten.movedim.int,
        aten.narrow.default, aten.numpy_T.default, aten.permute.default, aten.repeat.default,
        aten.repeat_interleave.self_int, aten.reshape.default, aten.select.int, aten.slice.Tensor,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
        aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
        aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    }
)  # fmt: skip
CASTS = frozenset({aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})


@dataclass(frozen=True)
class ConstantView:
    """A constant of one number a channel, as a graph shows it.

    Attributes:
        name: of the parameter or buffer.
        offset: what is added to it on the way: 1 where a norm multiplies by 1 + w.
        elements: for each element that is shown, which element of the constant it is; int64, of the shape shown.
        count: elements of the constant.
        alone: whether nothing but the value that was asked about reads it.
    """

    name: str
    offset: float
    elements: torch.Tensor
    count: int
    alone: bool


def constant_view(graph: Graph, node: object, sizes: Sizes) -> ConstantView | None:
    """The vector that `node` shows, looked at through casts, what moves elements, and one added number; else None."""
    chain: list[Node] = []
    offset = 0.0
    while isinstance(node, Node) and node.op == "call_function":
        if node.target in _SUMS:
            numbers = [value for value in node.args if isinstance(value, (int, float))]
            if len(numbers) != 1 or offset or node.kwargs or len(node.all_input_nodes) != 1:
                return None
            offset = float(numbers[0])
        elif node.target not in MOVES | CASTS or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        chain.append(node)
        node = next((value for value in node.args if isinstance(value, Node)), None)
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    stored = graph.stored(str(node.target))
    count = stored.numel()
    if not isinstance(stored, torch.Tensor) or not stored.is_floating_point() or stored.dim() != 1 or count < 2:
        return None
    elements = torch.arange(count)
    for step in reversed(chain):
        if step.target in MOVES:
            elements = run(step, elements, sizes)
    alone = all(len(step.users) == 1 for step in [node, *chain])
    return ConstantView(str(node.target), offset, elements, count, alone)


class Sharing:
    """Who reads each constant, and which constants are one storage under several names."""

    def __init__(self, graph: Graph) -> None:
        self._readers: dict[str, list[str]] = {}
        self._names: dict[tuple, list[str]] = {}
        for node in graph.module.graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                if name not in self._readers:
                    key = storage_key(graph.stored(name))
                    # Without memory of its own (a meta tensor) an address says nothing.
                    self._names.setdefault(key if key[0] else (name,), []).append(name)
                self._readers.setdefault(name, []).extend(module_path(user) or user.name for user in node.users)
        self._tied = {name: names for names in self._names.values() if len(names) > 1 for name in names}

    def problem(self, name: str) -> str | None:
        """Why the constant cannot be scaled for one reader alone, or None."""
        if name in self._tied:
            others = ", ".join(other for other in self._tied[name] if other != name)
            return f"{name} is tied to {others}"
        readers = self._readers.get(name, [])
        if len(readers) > 1:
            return f"{name} is read in {len(readers)} places: {', '.join(readers)}"
        return None
