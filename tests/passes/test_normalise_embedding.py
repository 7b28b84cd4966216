from __future__ import annotations

import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.passes.normalise.normalise_embedding import NormaliseEmbedding

aten = torch.ops.aten
IDS = torch.tensor([[1, 2], [3, 0]])


class Lookup(nn.Module):
    def __init__(self, view) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.view = view

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.view(self.table))


def test_an_alias_is_looked_through_and_the_storage_kept() -> None:
    module = Lookup(lambda table: table.detach())
    graph = capture(module, IDS)
    report = NormaliseEmbedding().run(graph, None)
    assert (report.matched, report.changed) == (1, 1)
    (lookup,) = [node for node in graph.nodes if node.target is aten.embedding.default]
    assert lookup.args[0].op == "get_attr" and lookup.args[0].target == "table"
    assert graph.module.table.data_ptr() == module.table.data_ptr()
    torch.testing.assert_close(graph.module(ids=IDS), module(IDS))


def test_another_view_of_the_table_becomes_a_table() -> None:
    module = Lookup(lambda table: table[:, :2])
    graph = capture(module, IDS)
    report = NormaliseEmbedding().run(graph, None)
    (lookup,) = [node for node in graph.nodes if node.target is aten.embedding.default]
    assert report.changed == 1 and lookup.args[0].target == "table_table"
    assert tuple(lookup.args[0].meta["val"].shape) == (5, 2)
    torch.testing.assert_close(graph.module(ids=IDS), module(IDS))


def test_a_computed_table_is_skipped_with_the_reason() -> None:
    graph = capture(Lookup(lambda table: table * 2 + table), IDS)
    report = NormaliseEmbedding().run(graph, None)
    assert (report.matched, report.changed) == (0, 0)
    assert [skip.reason for skip in report.skipped] == ["its table is computed, not a constant"]
