"""Block distillation: held-out errors fall, or the block stays as it was."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.numerics import affine
from qcompiler.numerics.straight_through import FakeLinear, fake_activations
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.linear_nbit import quantize_activations
from qcompiler.passes.solve.distill_blocks import DistillBlocks
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from tests.captures import analysed
from tests.sweep.prepared_context import context_of

W3A8 = {"bits": 3, "group": 64, "activations": "int8-token"}


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_every_block_gets_better_on_samples_that_no_step_saw(model_type: str):
    model = analysed(model_type)
    context = context_of(model, W3A8, samples=8, length=16)
    RoundToNearest().run(model.graph, context)
    before = {name: s.codes.clone() for name, s in context.solutions.items()}
    report = DistillBlocks(steps=20).run(model.graph, context)
    blocks = report.notes["blocks"]
    assert len(blocks) >= 2 and not report.skipped
    assert all(block["kept"] and block["after"] < block["before"] for block in blocks)
    assert all(context.solutions[name].format.bits == 3 for name in report.layers)
    assert any((context.solutions[name].codes != before[name]).any() for name in report.layers)


def test_what_does_not_get_better_is_dropped():
    model = analysed("llama")
    context = context_of(model, W3A8, samples=4)
    RoundToNearest().run(model.graph, context)
    before = dict(context.solutions)
    # Steps of hundreds of codes can only do damage.
    report = DistillBlocks(steps=2, rate=500.0).run(model.graph, context)
    assert report.changed == 0 and len(report.skipped) == len(report.notes["blocks"])
    assert "held-out error did not fall" in report.skipped[0].reason
    for name, solution in before.items():
        assert torch.equal(context.solutions[name].codes, solution.codes)


def test_equal_seeds_give_equal_weights():
    model = analysed("llama")
    codes = []
    for _ in range(2):
        context = context_of(model, W3A8, samples=4)
        RoundToNearest().run(model.graph, context)
        DistillBlocks(steps=5).run(model.graph, context)
        codes.append({name: s.codes for name, s in context.solutions.items()})
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_one_sample_cannot_be_both_learned_from_and_held_out():
    model = analysed("llama")
    context = context_of(model, W3A8, samples=1)
    RoundToNearest().run(model.graph, context)
    with pytest.raises(UsageError, match="expected at least 2, one is held out"):
        DistillBlocks().run(model.graph, context)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_untouched_student_is_the_solution(bits: int, symmetric: bool):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 96, generator=generator)
    solution = affine.fit(weight, AffineFormat(bits, 32, symmetric))
    student = FakeLinear(weight, solution, Activation.FLOAT)
    again = student.solution()
    assert torch.equal(again.codes, solution.codes) and torch.equal(again.scales, solution.scales)
    assert torch.allclose(student.weight(), solution.dequantize(), atol=1e-6)
    x = torch.randn(5, 96, generator=generator)
    student(x).square().sum().backward()
    assert student.latent.grad is not None and torch.isfinite(student.latent.grad).all() and student.latent.grad.any()
    assert student.log_scale.grad is not None and student.log_scale.grad.any()


@pytest.mark.parametrize("activation", [Activation.INT8_TOKEN, Activation.INT8_BLOCK])
@pytest.mark.parametrize("k", [96, 128, 200])
def test_activations_are_those_of_the_op(activation: Activation, k: int):
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(k))
    x[3] = 0
    q, scale = quantize_activations(x.numpy(), activation)
    assert torch.allclose(fake_activations(x, activation), torch.from_numpy(q * scale), rtol=1e-6, atol=1e-7)
