"""Compute in float32 what a float32 model computes in bfloat16 on the side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph
from qcompiler.pipeline.passes import Pass, Report

aten = torch.ops.aten

_ARITHMETIC = frozenset(
    {
        aten.add.Scalar, aten.add.Tensor, aten.div.Scalar, aten.div.Tensor, aten.mul.Scalar, aten.mul.Tensor,
        aten.neg.default, aten.pow.Tensor_Scalar, aten.sub.Scalar, aten.sub.Tensor,
    }
)  # fmt: skip
_SUMS = frozenset({aten.add.Scalar, aten.add.Tensor, aten.sub.Scalar, aten.sub.Tensor})


@dataclass(frozen=True)
class WidenBfloat16(Pass):
    """Surround bfloat16 arithmetic with casts: ONNX Runtime has no such kernels on CPUs. Every bit stays the same.

    mul(a: bfloat16, b: int64): bfloat16
        ─▶  to(mul(to(a, float32), to(to(b, bfloat16), float32)), bfloat16)
    """

    name: ClassVar[str] = "widen_bfloat16"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        report = Report()
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target not in _ARITHMETIC or _dtype(node) is not torch.bfloat16:
                continue
            report.matched += 1
            with module.graph.inserting_before(node):
                for source in list(node.all_input_nodes):
                    node.replace_input_with(source, _widened(node, source))
            node.args = tuple(_scalar(node, argument) for argument in args(node))
            with module.graph.inserting_after(node):
                rounded = _cast(node, node, torch.bfloat16)
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)
            rounded.meta["val"] = node.meta["val"]
            node.meta["val"] = node.meta["val"].to(torch.float32)
            node.meta.pop("tensor_meta", None)
            report.changed += 1
        module.recompile()
        return report


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _widened(node: Node, source: Node) -> Node:
    if _dtype(source) is None:
        return source
    # PyTorch converts every operand to the common type first: positions beyond 256 are rounded here.
    narrow = source if _dtype(source) is torch.bfloat16 else _cast(source, node, torch.bfloat16)
    return _cast(narrow, node, torch.float32)


def _scalar(node: Node, argument: object) -> object:
    # PyTorch's sums round a Python number to bfloat16 first; its products and quotients do not.
    if isinstance(argument, float) and node.target in _SUMS:
        return torch.tensor(argument, dtype=torch.bfloat16).item()
    return argument


def _cast(source: Node, like: Node, dtype: torch.dtype) -> Node:
    cast = like.graph.call_function(aten.to.dtype, (source, dtype))
    cast.meta = {key: value for key, value in like.meta.items() if key != "tensor_meta"}
    cast.meta["val"] = source.meta["val"].to(dtype)
    return cast
