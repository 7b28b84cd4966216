"""Bring every lookup of rows in a constant matrix into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompiler.graph.constants import Constant, attribute, constant_of, free_name, set_parameter
from qcompiler.graph.edit import args, get_constant
from qcompiler.graph.graph import Graph
from qcompiler.pipeline.passes import Pass, Report, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class NormaliseEmbedding(Pass):
    """Write every lookup in a constant matrix as `embedding` that reads the constant itself.

    embedding(alias(W), ids) | embedding(to(W), ids)    ─▶  embedding(W, ids)
    """

    name: ClassVar[str] = "normalise_embedding"
    stage: ClassVar[str] = "normalise"

    def run(self, graph: Graph, context: object) -> Report:
        module = graph.module
        report = Report()
        made: dict[str, str] = {}
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target is not aten.embedding.default:
                continue
            table = args(node)[0]
            constant = constant_of(table)
            if constant is None:
                report.skipped.append(Skip(node.name, "its table is computed, not a constant"))
                continue
            report.matched += 1
            if not constant.chain:
                continue
            name = _own_table(graph, constant, table, made)
            with module.graph.inserting_before(node):
                node.replace_input_with(table, get_constant(module, name, like=node))
            report.changed += 1
        module.graph.eliminate_dead_code()
        module.recompile()
        return report


def _own_table(graph: Graph, constant: Constant, table: Node, made: dict[str, str]) -> str:
    """Name of a parameter that holds the table as the lookup sees it."""
    value = constant.value(graph.module)
    original = attribute(graph.module, constant.name)
    if value.shape == original.shape and value.dtype == original.dtype and value.data_ptr() == original.data_ptr():
        return constant.name
    key = f"{constant.name} {table.name}"
    if key not in made:
        made[key] = free_name(graph.module, f"{constant.name}_table")
        set_parameter(graph.module, made[key], value.contiguous())
    return made[key]
