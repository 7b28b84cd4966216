"""Masks that a model makes with a function of its own: plain operators in the graph, whichever exporter traced it."""

from __future__ import annotations

import torch
import transformers
from transformers.masking_utils import create_bidirectional_mask

import qcompiler
from qcompiler.capture.capture import captured
from qcompiler.capture.prepare import prepare
from qcompiler.graph.verify import verify
from tests.captures import NORMALISE, run

WIDTH = 16


class Windowed(torch.nn.Module):
    """Attention within a window, the padding masked."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.BertConfig(hidden_size=WIDTH, attn_implementation="sdpa")
        self.project = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            and_mask_function=lambda batch, head, query, key: (query - key).abs() < 3,
        )
        y = self.project(x)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)[:, 0]


def case(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length)), "attention_mask": mask}


def test_both_exporters_trace_plain_operators() -> None:
    torch.manual_seed(0)
    model = Windowed().eval()
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    prepared = prepare(model, case(2, 9), {"x": axes, "attention_mask": axes})
    graph = captured(prepared)
    run(graph, NORMALISE)
    verify(graph, "normalised")
    given = case(3, 14)
    torch.testing.assert_close(graph.module(**given), model(**given))
    # Verified inside the exporter to ONNX, too.
    quantizer = qcompiler.Quantizer({"name": "masks", "linear": {"bits": 8}, "allow": {"min_coverage": 0}}, verify_each=True)
    assert prepared.export_onnx(quantizer).graph.outputs
