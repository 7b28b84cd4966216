"""Constant weights that take part in a product and are no site: what they weigh, and why they stay in float."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from qcompiler.graph.constants import attribute
from qcompiler.graph.edit import args
from qcompiler.passes.analyse.walk import PARTS, PLAIN, PRODUCTS
from qcompiler.passes.normalise.experts_forms import is_grouped

aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
     aten.conv3d.padding, aten.conv_tbc.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
     aten.conv_transpose3d.input, aten.convolution.default}
)  # fmt: skip
# Products inside an op that has no quantized form, by what they are.
_OTHERS = {
    aten.bilinear.default: "bilinear forms", aten.embedding_bag.default: "sums of looked up rows",
    aten.embedding_bag.padding_idx: "sums of looked up rows", aten.gru.input: "recurrent layers",
    aten.lstm.input: "recurrent layers", aten.rnn_relu.input: "recurrent layers", aten.rnn_tanh.input: "recurrent layers",
}  # fmt: skip
_MATRIX_PRODUCTS = PRODUCTS | {aten.addmm.default, aten.linear.default, aten.mv.default, aten.dot.default}
# What picks some of a weight's matrices, or joins and shapes them, on the way to a product.
_PICKING = frozenset(
    {aten.cat.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.mul.Tensor,
     aten.select.int, aten.stack.default, aten.t.default, aten.numpy_T.default, aten.mT.default}
)  # fmt: skip


def find_leftovers(module: GraphModule, sites: set[str]) -> dict[str, tuple[int, str]]:
    """name -> (bytes, why) for every constant of two axes or more that a product reads and that no site owns."""
    found: dict[str, tuple[int, str]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or not (
            node.target in _MATRIX_PRODUCTS | _CONVOLUTIONS or node.target in _OTHERS or is_grouped(node)
        ):
            continue
        for name, picked in _constants(node):
            if name in sites or name in found:
                continue
            tensor = attribute(module, name)
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.is_floating_point():
                found[name] = (tensor.numel() * tensor.element_size(), _reason(node, tensor, picked))
    return found


def _constants(node: Node) -> list[tuple[str, bool]]:
    """Constants that a product's factors show, and whether rows or matrices of them are picked by computed indices."""
    found: list[tuple[str, bool]] = []
    factors = node.all_input_nodes
    # A bias has its own op's argument and takes no part in the product.
    if node.target in _CONVOLUTIONS | {aten.linear.default}:
        factors = [factor for factor in args(node)[:2] if isinstance(factor, Node)]
    queue = [(factor, False) for factor in factors]
    seen: set[Node] = set()
    while queue:
        source, picked = queue.pop(0)
        if source in seen:
            continue
        seen.add(source)
        if source.op == "get_attr":
            found.append((str(source.target), picked))
        elif source.op == "call_function" and source.target in PLAIN | PARTS | _PICKING:
            indexed = source.target in (aten.index.Tensor, aten.index_select.default, aten.gather.default)
            # Indices are no weights; a product of two computed values is no weight either.
            inputs = args(source)[0] if source.target in (aten.cat.default, aten.stack.default) else args(source)[:1]
            if source.target is aten.mul.Tensor:
                inputs = source.all_input_nodes if any(i.op == "get_attr" for i in source.all_input_nodes) else ()
            queue += [(value, picked or indexed) for value in inputs if isinstance(value, Node)]
    return found


def _reason(node: Node, tensor: torch.Tensor, picked: bool) -> str:
    op = str(node.target).removesuffix(".default").removesuffix(".padding")
    if node.target in _CONVOLUTIONS:
        return f"{op}: convolutions stay in float"
    if node.target in _OTHERS:
        return f"{op}: {_OTHERS[node.target]} stay in float"
    if tensor.dim() == 3 and (picked or is_grouped(node) or node.target in (aten.bmm.default, aten.baddbmm.default)):
        return f"{op}: a stack of {tensor.shape[0]} matrices, in a form that is not read as one matrix for each row"
    if picked:
        return f"{op}: rows of the weight are picked by computed indices"
    if tensor.dim() > 2:
        return f"{op}: a weight with {tensor.dim()} axes; only matrices are quantized"
    return f"{op}: the weight is not the right factor of a product over the last axis"
