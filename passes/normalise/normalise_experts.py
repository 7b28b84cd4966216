"""Bring every product of rows with the constant matrices of their experts into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompiler.graph.calls import call
from qcompiler.graph.constants import attribute, free_name, readers, set_parameter, storage_key
from qcompiler.graph.edit import args, get_constant
from qcompiler.graph.graph import Graph
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.passes.normalise.experts_forms import ExpertsProduct, bias_after, experts_product, without_ones
from qcompiler.pipeline.passes import Pass, Report, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class NormaliseExperts(Pass):
    """Write every product of rows with matrices that computed indices pick as `experts_linear` with a weight of its own.

    bmm(W[i], unsqueeze(x, -1)) | bmm(unsqueeze(x, 1), V[i]) | einsum("bk,bnk->bn", x, W[i])   ─▶  experts_linear(x, i, W)
    add(experts_linear(x, i, W), b[i])        ─▶  experts_linear(x, i, W, b)
    grouped_mm(x, V, offsets)                 ─▶  experts_linear(x, how many offsets lie at or before each row, W)
    bmm(x, V) | bmm(W, x)                     ─▶  experts_linear(rows of x, the batch of each, W), reshaped

    where W is `[experts, n, k]`, and V `[experts, k, n]` its transpose.
    """

    name: ClassVar[str] = "normalise_experts"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        report = Report()
        weights: dict[str, str] = {}
        for node in list(module.graph.nodes):
            product = experts_product(node)
            if product is None:
                continue
            if isinstance(product, str):
                report.skipped.append(Skip(node.name, product))
                continue
            value = _matrices(module, product)
            if value.dim() != 3 or not value.dtype.is_floating_point:
                report.skipped.append(Skip(node.name, f"constant {product.weight.name} is no stack of matrices"))
                continue
            report.matched += 1
            _replace(module, node, product, _weight(module, product, value, weights))
            report.changed += 1
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return report


def _matrices(module: GraphModule, product: ExpertsProduct) -> torch.Tensor:
    """`[experts, n, k]`; a view wherever the graph's own ops are, so that what is mapped from a file stays there."""
    value = product.weight.value(module)
    return value.transpose(1, 2) if product.transposed and value.dim() == 3 else value


def _weight(module: GraphModule, product: ExpertsProduct, value: torch.Tensor, made: dict[str, str]) -> str:
    """Name of a parameter that holds `value`: `weight` of a module, by which the site will be named."""
    name = product.weight.name
    key = repr((name, storage_key(value)))
    if key in made:
        return made[key]
    if name.rpartition(".")[2] == "weight" and storage_key(attribute(module, name)) == storage_key(value):
        made[key] = name
        return name
    target = f"{name}.weight"
    if name.rpartition(".")[2] == "weight":
        target = name
    if len(readers(module, name)) > 1:
        target = free_name(module, f"{name}_experts") + ".weight"
    elif target != name:  # the module takes the place of the parameter
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    set_parameter(module, target, value)
    made[key] = target
    return target


def _replace(module: GraphModule, node: Node, product: ExpertsProduct, weight: str) -> None:
    # What the graph does next is part of the form: the axis of size 1 goes, a bias picked by the same index is added.
    last, bias, flat = node, None, product.form == "rows"
    picks = product.index is not None or product.offsets is not None
    if picks and not flat and (squeezed := without_ones(node)) is not None:
        last, flat = squeezed, True
    if flat and (found := bias_after(last, product.index)) is not None:
        last, bias = found
    replaced = [last]
    while replaced[-1] is not node:
        replaced.append(next(s for s in replaced[-1].all_input_nodes if s is node or node in s.all_input_nodes))

    def make(target: Any, *arguments: Any) -> Node:
        return call(module, target, arguments, like=node)

    with module.graph.inserting_before(last):
        attr = get_constant(module, weight, like=node)
        constants = [attr] if bias is None else [attr, get_constant(module, bias.name, like=node)]
        if picks:
            expert = product.index if product.index is not None else _from_offsets(make, product.x, product.offsets)
            new = make(EXPERTS_LINEAR, _rows(make, product), expert, *constants)
            if not flat:
                new = make(aten.unsqueeze.default, new, 1 if product.form == "left" else 2)
        else:
            new = _every_batch(make, product, constants)
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    for old in replaced:
        module.graph.erase_node(old)


def _rows(make: Any, product: ExpertsProduct) -> Node:
    """x as `[rows, k]`."""
    x = product.x
    if product.form == "rows":
        return x
    if x.target is aten.unsqueeze.default and args(x)[0].meta["val"].dim() == 2:
        return args(x)[0]
    return make(aten.reshape.default, x, [-1, x.meta["val"].shape[2 if product.form == "left" else 1]])


def _from_offsets(make: Any, x: Node, offsets: Node | None) -> Node:
    """The expert of each row of sorted rows: how many experts end at or before it."""
    numbers = make(aten.arange.default, make(aten.sym_size.int, x, 0))
    ended = make(aten.ge.Tensor, make(aten.unsqueeze.default, numbers, 1), make(aten.unsqueeze.default, offsets, 0))
    return make(aten.sum.dim_IntList, ended, [1])


def _every_batch(make: Any, product: ExpertsProduct, constants: list[Node]) -> Node:
    """Batch i with matrix i: rows in the order of the batches, and back."""
    x, right = product.x, product.form == "right"
    experts, n = constants[0].meta["val"].shape[:2]
    m = x.meta["val"].shape[2 if right else 1]
    size = m if isinstance(m, int) else make(aten.sym_size.int, x, 2 if right else 1)
    x = make(aten.transpose.int, x, 1, 2) if right else x
    batch = make(aten.unsqueeze.default, make(aten.arange.default, experts), 1)
    batch = make(aten.reshape.default, make(aten.expand.default, batch, [experts, size]), [-1])
    rows = make(aten.reshape.default, x, [-1, x.meta["val"].shape[2]])
    y = make(aten.reshape.default, make(EXPERTS_LINEAR, rows, batch, *constants), [experts, size, n])
    return make(aten.transpose.int, y, 1, 2) if right else y
