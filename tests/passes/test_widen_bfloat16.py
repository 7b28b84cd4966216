from __future__ import annotations

import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.passes.normalise.widen_bfloat16 import WidenBfloat16

aten = torch.ops.aten


class Slopes(nn.Module):
    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return ((x.bfloat16() * positions + 0.3) * 0.7).float() + x


def test_every_bit_stays_the_same_and_no_arithmetic_is_left_in_bfloat16() -> None:
    # Positions beyond 256 are rounded by the conversion to bfloat16, products by the result.
    inputs = {"x": torch.rand(50, 1), "positions": torch.arange(50 * 900).reshape(50, 900)}
    graph = capture(Slopes(), inputs)
    expected = Slopes()(**inputs)
    report = WidenBfloat16().run(graph, None)
    assert (report.matched, report.changed) == (3, 3)
    left = [node for node in graph.nodes if node.target in (aten.mul.Tensor, aten.add.Tensor)]
    assert all(node.meta["val"].dtype is torch.float32 for node in left) and len(left) == 4
    assert torch.equal(graph.module(**inputs), expected)


def test_float32_arithmetic_is_left_alone() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    report = WidenBfloat16().run(graph, None)
    assert (report.matched, report.changed, report.skipped) == (0, 0, [])
