"""The float form of products with experts: in torch, and in ONNX for mixtures that stay in float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.ops.experts_linear import EXPERTS_LINEAR, rows_by_expert
from qcompiler.ops.onnx_ops import register

E, N, K = 5, 3, 8


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    expert = torch.tensor([3, 0, 3, 1, 1, 0, 3])  # none for 2 and 4
    shapes = ((len(expert), K), (E, N, K), (E, N))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, expert, weight, bias


def test_rows_come_by_expert_in_their_order() -> None:
    _, expert, _, _ = inputs()
    found = {index: rows.tolist() for index, rows in rows_by_expert(expert, E)}
    assert found == {0: [1, 5], 1: [3, 4], 3: [0, 2, 6]} and list(found) == sorted(found)
    assert list(rows_by_expert(expert[:0], E)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_meets_its_own_matrix(dtype: torch.dtype) -> None:
    x, expert, weight, bias = inputs()
    weight, bias = weight.to(dtype), bias.to(dtype)
    expected = torch.einsum("rk,rnk->rn", x, weight.float()[expert])
    torch.testing.assert_close(EXPERTS_LINEAR(x, expert, weight), expected)
    torch.testing.assert_close(EXPERTS_LINEAR(x, expert, weight, bias), expected + bias.float()[expert])
    assert EXPERTS_LINEAR(x[:0], expert[:0], weight).shape == (0, N)


@pytest.mark.parametrize("wrong", [-1, E])
def test_an_index_that_is_no_expert_is_an_error(wrong: int) -> None:
    x, expert, weight, _ = inputs()
    with pytest.raises(ValueError, match=r"expected \[0, 4\]"):
        EXPERTS_LINEAR(x, expert.index_fill(0, torch.tensor([2]), wrong), weight)


@pytest.mark.parametrize("biased", [False, True])
def test_onnx_form(biased: bool) -> None:
    register()
    x, expert, weight, bias = inputs()

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

        def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            return EXPERTS_LINEAR(x, expert, self.weight, self.bias if biased else None)

    rows = torch.export.Dim("rows")
    shapes = {"x": {0: rows}, "expert": {0: rows}}
    program = torch.onnx.export(Module().eval(), (x, expert), dynamo=True, dynamic_shapes=shapes, verbose=False)
    content = ir.serde.serialize_model(program.model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    run = lambda x, expert: session.run(None, {"x": x.numpy(), "expert": expert.numpy()})[0]  # noqa: E731
    expected = EXPERTS_LINEAR(x, expert, weight, bias if biased else None).numpy()
    np.testing.assert_allclose(run(x, expert), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(x[2:3], expert[2:3]), expected[2:3], rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="(?i)out of.* bounds|indices"):
        run(x, torch.full_like(expert, E))


def test_the_gradient_of_the_rows():
    """A block that holds a mixture is tuned through it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    expert = torch.tensor([3, 0, 0, 2, 3, 3, 0])
    assert torch.autograd.gradcheck(lambda rows: EXPERTS_LINEAR(rows, expert, weight), (x,))
    with pytest.raises(NotImplementedError, match="no gradient for its weight"):
        EXPERTS_LINEAR(x, expert, weight.requires_grad_()).sum().backward()
