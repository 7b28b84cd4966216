from __future__ import annotations

import difflib
import os
import subprocess
import sys

import torch
from torch import nn

from qcompiler.capture.capture import capture
from qcompiler.graph.text import graph_text
from tests.captures import NORMALISE, analysed, run

aten = torch.ops.aten


class Attention(nn.Module):
    """One layer that shows sizes, splits, shapes and shared constants."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = ((q @ k.mT) * self.scale).softmax(-1) @ v
        return self.out(self.out(y) * self.scale).reshape(x.shape[0] * x.shape[1], 8)


def example() -> dict:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    return dict(example={"x": x}, dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})


GOLDEN = """\
x: float32[s0, s1, 8] = placeholder
sym_size: s0 = aten.sym_size.int(x, 0)
sym_size_1: s1 = aten.sym_size.int(x, 1)
qkv.weight: float32[24, 8] = parameter
qkv/linear: float32[s0, s1, 24] = aten.linear(x, qkv.weight)
chunk: (float32[s0, s1, 8], float32[s0, s1, 8], float32[s0, s1, 8]) = aten.chunk(qkv/linear, 3, -1)
getitem: float32[s0, s1, 8] = operator.getitem(chunk, 0)
getitem_1: float32[s0, s1, 8] = operator.getitem(chunk, 1)
getitem_2: float32[s0, s1, 8] = operator.getitem(chunk, 2)
mT: float32[s0, 8, s1] = aten.mT(getitem_1)
matmul: float32[s0, s1, s1] = aten.matmul(getitem, mT)
scale: float32[] = buffer
mul: float32[s0, s1, s1] = aten.mul.Tensor(matmul, scale)
softmax: float32[s0, s1, s1] = aten.softmax.int(mul, -1)
matmul_1: float32[s0, s1, 8] = aten.matmul(softmax, getitem_2)
out.weight: float32[8, 8] = parameter
out.bias: float32[8] = parameter
out/linear: float32[s0, s1, 8] = aten.linear(matmul_1, out.weight, out.bias)
mul_1: float32[s0, s1, 8] = aten.mul.Tensor(out/linear, scale)
out/linear_1: float32[s0, s1, 8] = aten.linear(mul_1, out.weight, out.bias)
mul_2: s0*s1 = operator.mul(sym_size, sym_size_1)
reshape: float32[s0*s1, 8] = aten.reshape(out/linear_1, [mul_2, 8])
output = [reshape]
"""


def golden_graph():
    graph = capture(Attention(), **example())
    run(graph, NORMALISE)
    return graph


def test_golden() -> None:
    text = graph_text(golden_graph().module)
    assert text == GOLDEN, "\n".join(difflib.unified_diff(GOLDEN.splitlines(), text.splitlines(), lineterm=""))


def test_a_node_put_in_changes_its_own_line_and_its_readers() -> None:
    graph = golden_graph()
    linear = next(node for node in graph.nodes if node.target is aten.linear.default)
    with graph.module.graph.inserting_before(linear):
        smoothed = graph.module.graph.call_function(aten.mul.Tensor, (linear.args[0], 2.0))
        smoothed.meta = dict(linear.meta, val=linear.args[0].meta["val"])
    linear.replace_input_with(linear.args[0], smoothed)
    difference = difflib.ndiff(GOLDEN.splitlines(), graph_text(graph.module).splitlines())
    changed = [line for line in difference if line[0] in "+-"]
    assert changed == [
        "+ qkv/mul: float32[s0, s1, 8] = aten.mul.Tensor(x, 2.0)",
        "- qkv/linear: float32[s0, s1, 24] = aten.linear(x, qkv.weight)",
        "+ qkv/linear: float32[s0, s1, 24] = aten.linear(qkv/mul, qkv.weight)",
    ]


def test_the_place_of_a_constant_node_does_not_show() -> None:
    graph = golden_graph()
    last = next(node for node in reversed(graph.nodes) if node.target is aten.linear.default)
    with graph.module.graph.inserting_before(last):
        again = graph.module.graph.get_attr("out.weight")
        again.meta["val"] = last.args[1].meta["val"]
    last.replace_input_with(last.args[1], again)
    assert graph_text(graph.module) == GOLDEN


def test_values_are_not_shown() -> None:
    graph = golden_graph()
    with torch.no_grad():
        graph.module.out.weight.fill_(7.0)
    assert graph_text(graph.module) == GOLDEN


def test_another_process_gives_the_same_text() -> None:
    program = (
        "from tests.graph.test_text import golden_graph; from qcompiler.graph.text import graph_text;"
        "import sys; sys.stdout.write(graph_text(golden_graph().module))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, text=True, check=True, capture_output=True)
    assert other.stdout == GOLDEN


def test_a_model_s_text_names_layers_and_diffs_small() -> None:
    made = analysed("gpt2")
    before, after = made.texts["captured"].splitlines(), made.texts["normalised"].splitlines()
    assert "transformer.h.0.mlp.c_fc.weight: float32[1024, 256] = parameter" in after
    assert len(set(line.partition(":")[0] for line in after)) == len(after)
    # Each of the 8 products loses its two views; a line of another layer never moves.
    kept = set(before) & set(after)
    assert len(kept) > 0.5 * len(after)
