"""Bring every product with a constant matrix into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qcompiler.graph.constants import TRANSPOSING, Constant, constant_of, free_name, readers, set_parameter
from qcompiler.graph.edit import args, get_constant
from qcompiler.graph.graph import Graph
from qcompiler.passes.normalise.einsum import contraction
from qcompiler.pipeline.passes import Pass, Report, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """`x · W (+ b)`: its input, its constant, whether that is `[k, n]` rather than `[n, k]`, and its bias."""

    x: Node
    weight: Constant
    transposed: bool
    bias: Node | None = None


@dataclass(frozen=True)
class NormaliseLinear(Pass):
    """Write every product with a constant matrix as `linear` with a weight `[n, k]` of its own.

    linear(x, W)                              ─▶  itself
    linear(x, to(W)) | matmul(x, t(W)) | mm(x, V) | einsum("bk,nk->bn", x, W)   ─▶  linear(x, W)
    view(addmm(b, view(x, [-1, k]), V), [*x.shape[:-1], n])                     ─▶  linear(x, W, b)

    where V is `[k, n]` and W its transpose, made once and kept under V's name.
    """

    name: ClassVar[str] = "normalise_linear"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        report = Report()
        weights: dict[str, str] = {}
        for node in list(module.graph.nodes):
            product = _product(node)
            if product is None:
                continue
            if isinstance(product, str):
                report.skipped.append(Skip(node.name, product))
                continue
            report.matched += 1
            if node.target is aten.linear.default and not product.weight.chain:
                continue
            weight = _weight(module, product, weights)
            _replace(module, node, product, weight)
            report.changed += 1
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return report


def _product(node: Node) -> _Product | str | None:
    """What the node computes, or why it cannot be written as a linear, or None where no constant matrix is involved."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*args(node), None)[:3]
        return _checked(x, constant_of(weight), False, bias, node)
    if node.target is aten.addmm.default:
        bias, x, weight = args(node)
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return "addmm with alpha or beta other than 1" if constant_of(weight) else None
        return _checked(x, constant_of(weight), True, bias, node)
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight = args(node)
        if constant_of(weight) is None and (left := constant_of(x)) is not None:
            return f"constant {left.name} is the left factor" if x.meta["val"].dim() >= 2 else None
        return _checked(x, constant_of(weight), True, None, node)
    if node.target is aten.einsum.default and len(args(node)[1]) == 2:
        x, weight = args(node)[1]
        constant = constant_of(weight)
        if constant is None:
            return None
        transposed = contraction(str(args(node)[0]))
        if transposed is None:
            return f"einsum {args(node)[0]!r} with constant {constant.name} is no product over the last axis"
        return _checked(x, constant, transposed, None, node)
    return None


def _checked(
    x: Node, weight: Constant | None, transposed: bool, bias: Node | None, node: Node
) -> _Product | str | None:
    if weight is None:
        return None
    operand = args(node)[2] if node.target is aten.addmm.default else None
    if operand is None:
        operand = args(node)[1][1] if node.target is aten.einsum.default else args(node)[1]
    shape = operand.meta["val"].shape
    if len(shape) != 2:
        return f"constant {weight.name} is used with {len(shape)} axes" if len(shape) > 2 else None
    if not operand.meta["val"].dtype.is_floating_point:
        return f"constant {weight.name} is {operand.meta['val'].dtype}"
    if bias is not None and bias.meta["val"].dim() != 1:
        return f"bias {bias.name} of the product with {weight.name} has {bias.meta['val'].dim()} axes"
    return _Product(x, weight, transposed, bias)


def _weight(module: GraphModule, product: _Product, made: dict[str, str]) -> str:
    """Name of a parameter `[n, k]` for the product, making it where there is none yet."""
    weight = product.weight
    swaps = [node for node in weight.chain if node.target in TRANSPOSING and _swaps(node)]
    if len(swaps) == len(weight.chain) and (len(swaps) + product.transposed) % 2 == 0:
        return weight.name
    chain = [(str(node.target), args(node)[1:], dict(node.kwargs)) for node in weight.chain]
    key = repr((weight.name, product.transposed, chain))
    if key not in made:
        value = weight.value(module)
        value = (value.t() if product.transposed else value).contiguous()
        # Under its own name where nobody else reads it, so that the module path stays what the user knows.
        alone = len(readers(module, weight.name)) == 1
        made[key] = weight.name if alone else free_name(module, f"{weight.name}_linear")
        set_parameter(module, made[key], value)
    return made[key]


def _swaps(node: Node) -> bool:
    """Whether a transposing op swaps the two axes of a matrix (a permutation may also leave them)."""
    if node.meta["val"].dim() != 2:
        return False
    if node.target is aten.permute.default:
        return [axis % 2 for axis in args(node)[1]] == [1, 0]
    if node.target is aten.transpose.int:
        return args(node)[1] % 2 != args(node)[2] % 2
    return True


def _replace(module: GraphModule, node: Node, product: _Product, weight: str) -> None:
    x, replaced = product.x, node
    # The flattening around addmm: the output's leading axes are the input's before it was flattened.
    if x.target in (aten.view.default, aten.reshape.default) and len(node.users) == 1:
        (user,) = node.users
        source = args(x)[0]
        if user.target in (aten.view.default, aten.reshape.default) and _same_leading_axes(source, user):
            x, replaced = source, user
    with module.graph.inserting_before(replaced):
        attr = get_constant(module, weight, like=node)
        arguments = (x, attr) if product.bias is None else (x, attr, product.bias)
        linear = module.graph.call_function(aten.linear.default, arguments)
    linear.meta = dict(node.meta)
    linear.meta["val"] = replaced.meta["val"]
    linear.meta.pop("tensor_meta", None)
    replaced.replace_all_uses_with(linear)
    module.graph.erase_node(replaced)
    if replaced is not node:
        module.graph.erase_node(node)


def _same_leading_axes(source: Node, result: Node) -> bool:
    before, after = source.meta["val"].shape, result.meta["val"].shape
    return len(before) == len(after) and all(
        isinstance(old, int) == isinstance(new, int) and str(old) == str(new)
        for old, new in zip(before[:-1], after[:-1], strict=True)
    )
