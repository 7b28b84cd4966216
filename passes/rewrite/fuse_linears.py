"""Make one product of several that read the same value.

q = linear(x, A)                                          ─▶  q, k, v = split(linear(x, [A; B; C]))
k = linear(x, B)
v = linear(x, C)

A packed weight is tiles of 16 rows one after another, so the tensors of the parts are laid end to end and every result keeps its
bits. Activations are rounded once where they were rounded for each part, and one op starts where several did.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qcompiler.graph import constants
from qcompiler.graph.calls import under_mode
from qcompiler.graph.edit import args
from qcompiler.graph.mapped import kept
from qcompiler.ops.spec import SPECS
from qcompiler.ops.torch_ops import overload
from qcompiler.passes.rewrite.fusable import Product, chunks, product_of, runs
from qcompiler.passes.rewrite.strided_views import reshape_strided_views
from qcompiler.pipeline.passes import Pass, Report

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context

aten = torch.ops.aten

@dataclass(frozen=True)
class FuseLinears(Pass):
    """Fuse the linear ops that read one value and follow each other with no other layer between them.

    So q, k and v, or gate and up, become one; what reads the same value elsewhere, the keys and values of another layer's cross
    attention for instance, stays where it is used. The fused op stands in the place of its first part.
    """

    name: ClassVar[str] = "fuse_linears"
    stage: ClassVar[str] = "rewrite"

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report()
        before = len(graph.module.graph.nodes)
        for run in runs(graph.sites):
            report.matched += 1
            products = [product_of(graph, site, report.skipped) for site in run]
            for parts in chunks([p for p in products if p is not None], report.skipped):
                fused = _fuse(graph, context, parts)
                for part, rows in zip(parts, _rows(parts), strict=True):
                    report.layers[part.site.name] = {"packed_as": fused, "packed_rows": list(rows)}
                report.changed += 1
        graph.module.graph.eliminate_dead_code()
        constants.drop_unused(graph.module)
        graph.module.recompile()
        report.notes["nodes"] = len(graph.module.graph.nodes) - before
        return report


def _rows(parts: list[Product]) -> Iterator[tuple[int, int]]:
    """First row of each part in the fused weight, and the row after its last."""
    start = 0
    for part in parts:
        yield start, start + part.rows
        start += part.rows


def fused_name(module: torch.fx.GraphModule, names: list[str]) -> str:
    """`block.attn.q+k+v` for `block.attn.q`, `block.attn.k` and `block.attn.v`; a name that no submodule has."""
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(path) > depth + 1 for path in split) and len({path[depth] for path in split}) == 1:
        depth += 1
    name = ".".join([*split[0][:depth], "+".join("_".join(path[depth:]) for path in split)])
    known = {path for path, _ in module.named_modules()}
    number = 1
    while (free := name if number == 1 else f"{name}#{number}") in known:
        number += 1
    return free


def _fuse(graph: Graph, context: Context, parts: list[Product]) -> str:
    """Put one op and a split in the place of the parts; returns the name under which its tensors are held."""
    first, fx = parts[0], graph.module.graph
    spec, name = SPECS[first.op], fused_name(graph.module, [part.site.name for part in parts])
    tensors = _joined(graph, context, parts, name)
    attributes = first.attributes | {"n": sum(part.rows for part in parts)}
    with fx.inserting_before(first.node):
        given: dict[str, Any] = {"x": args(first.node)[0]}
        for key, tensor in tensors.items():
            given[key] = fx.get_attr(constants.add_buffer(graph.module, f"{name}.{key}", tensor))
            given[key].meta["val"] = tensor
        inputs = [given.get(i.name) for i in spec.inputs]
        fused = fx.call_function(overload(spec.name), (*inputs, *(attributes[key] for key in spec.attributes)))
        value = first.node.meta["val"]
        fused.meta = _common_meta(parts)
        fused.meta["val"] = under_mode(value, lambda: value.new_empty((*value.shape[:-1], attributes["n"])))
        sizes = [part.rows for part in parts]
        split = fx.call_function(aten.split_with_sizes.default, (fused, sizes, -1))
        split.meta = dict(fused.meta)
        split.meta["val"] = under_mode(value, lambda: aten.split_with_sizes.default(fused.meta["val"], sizes, -1))
        pieces = [fx.call_function(operator.getitem, (split, index)) for index in range(len(parts))]
    for part, piece, shown in zip(parts, pieces, split.meta["val"], strict=True):
        node, part.site.node = part.node, fused
        piece.meta = dict(node.meta) | {"val": shown}
        node.replace_all_uses_with(piece)
        fx.erase_node(node)
    reshape_strided_views(pieces)
    return name


def _joined(graph: Graph, context: Context, parts: list[Product], name: str) -> dict[str, torch.Tensor]:
    """The tensors of the fused op by input name; mapped from files where the context has a folder for them."""
    made: dict[str, torch.Tensor] = {}
    for key in parts[0].constants:
        if key in parts[0].shared:
            made[key] = graph.stored(parts[0].constants[key])
            continue
        # a bias may be stored in half precision, or scaled
        read = graph.stored if key != "bias" else lambda held: graph.constant(held).reshape(-1)
        made |= kept({key: torch.cat([read(part.constants[key]) for part in parts])}, context.scratch, name)
    for part in parts:  # what they were joined from goes with the nodes that read it
        context.packed.pop(id(context.solutions[part.site.name]), None)
    return made


def _common_meta(parts: list[Product]) -> dict[str, Any]:
    """The meta data of the first part's node, of its modules those that all parts belong to."""
    meta = dict(parts[0].node.meta)
    stacks = [part.node.meta.get("nn_module_stack") or {} for part in parts]
    meta["nn_module_stack"] = {key: value for key, value in stacks[0].items() if all(s.get(key) == value for s in stacks)}
    return meta
