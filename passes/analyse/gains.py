"""Which constants are gains of norms: one number a channel that a value is multiplied by."""

from __future__ import annotations

import torch
from torch.fx import Node

from qcompiler.graph.constants import storage_key
from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph
from qcompiler.passes.analyse.fold_constants import CASTS
from qcompiler.passes.analyse.walk import upstream

aten = torch.ops.aten

# The op, and where its gain stands.
_NORMS = {aten.layer_norm.default: 2, aten.rms_norm.default: 2}
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})


def gains(graph: Graph) -> list[str]:
    """Names of the vectors that nothing but norms and products read, as they are, cast, or with a number added (1 + w).

    A buffer is no gain but a table, a constant of a product with other constants is none either, and one that is tied to
    another is left out.
    """
    readers: dict[str, list[Node]] = {}
    names: dict[object, set[str]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).append(node)
            names.setdefault(storage_key(graph.stored(str(node.target))), set()).add(str(node.target))
    found = []
    for name, nodes in readers.items():
        stored = graph.stored(name)
        vector = isinstance(stored, torch.nn.Parameter) and stored.dim() == 1 and stored.numel() > 1
        if vector and stored.is_floating_point() and len(names[storage_key(stored)]) == 1 and all(map(_multiplies, nodes)):
            found.append(name)
    return found


def _multiplies(node: Node) -> bool:
    """Whether every reader multiplies a computed value by the constant."""
    if not node.users:
        return False
    for user in node.users:
        if user.target in CASTS or (user.target in _SUMS and len(user.all_input_nodes) == 1):
            if not _multiplies(user):
                return False
        elif user.target in _NORMS:
            given = args(user)
            if len(given) <= _NORMS[user.target] or given[_NORMS[user.target]] is not node or given[0] is node:
                return False
        elif user.target is not aten.mul.Tensor:
            return False
        else:
            others = [source for source in user.all_input_nodes if source is not node]
            if not upstream(others, lambda source: source.op == "placeholder")[0]:
                return False  # a product of constants
    return True
