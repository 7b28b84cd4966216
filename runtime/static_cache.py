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

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompiler.runtime import static_ops as ops
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.static_kinds import Kinds
from qcompiler.runtime.static_lengths import Refused, expression, say
from qcompiler.runtime.static_ops import packet

aten = torch.ops.aten
CPU = torch.device("cpu")


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


class _Edit(Kinds):
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
        self.new = expression(self.tokens.meta["val"].shape[-1])
        self.axis: dict[Node, int] = {}
        self.masked: set[Node] = set()  # zero on every place that is not filled
        self.masks: dict[Any, Node] = {}
        for node, info in self.infos.items():
            if info.role in ("past_key", "past_value") or info.name in self.states:
                self._find_axis(node, info.name)
        self.growing = list(self.axis)
        self.pasts = {expression(node.meta["val"].shape[axis]) for node, axis in self.axis.items()}
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
            raise Refused(f"{say(node)} reads a past cache, which only the concatenation with new tokens may")
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
            raise Refused(f"{say(node)} has cached positions on an axis, and nothing is known of what it does along it")
        handler(node)


def _flat(value: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(value))
