"""Solvers that weigh tokens: by ones they are the plain ones, by a guide they do better where the loss cares."""

from __future__ import annotations

import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.numerics import affine
from qcompiler.numerics.stack import rows_joined
from qcompiler.ops.formats import AffineFormat
from qcompiler.passes.observe.guide import Guide
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.guided import GuidedMoments, check_guides
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep
from tests.captures import analysed
from tests.sweep.prepared_context import context_of, linear_sites

W3 = {"bits": 3, "group": 64, "symmetric": False}


def test_guided_by_ones_is_plain():
    model = analysed("llama")
    plain, guided = (context_of(model, W3, samples=24, length=16) for _ in range(2))
    guided.guides = {site.name: torch.ones(24 * 16, 2) for site in linear_sites(model)}
    attention = Select(role="attn.*")
    reports = [Gptq(select=attention, guided=flag).run(model.graph, c) for flag, c in ((False, plain), (True, guided))]
    for name, layer in reports[0].layers.items():
        other = reports[1].layers[name]
        assert other["error_before"] == pytest.approx(layer["error_before"], rel=1e-5)
        assert other["error_after"] == pytest.approx(layer["error_after"], rel=0.02)
    first = "model.layers.0.self_attn.q_proj"  # nothing solved before it: the same H to the last bit
    same = plain.solutions[first].codes == guided.solutions[first].codes
    assert float(same.float().mean()) > 0.999


def test_what_the_loss_cares_for_loses_less():
    """The guided error of guided weights is below that of plain ones, in every layer that reads what both contexts give it."""
    attention = Select(role="attn.*")
    model = analysed("llama")
    guided, plain = (context_of(model, W3, samples=24, length=16) for _ in range(2))
    Guide(groups=2).run(model.graph, guided)
    report = Gptq(guided=True, select=attention).run(model.graph, guided)
    assert not report.fallbacks and report.changed == 8
    assert all(layer["error_after"] < layer["error_before"] for layer in report.layers.values())
    Gptq(select=attention).run(model.graph, plain)
    plain.guides = guided.guides
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    sites = [model.graph.site(name) for name in names]
    sweep = Sweep(model.graph, context_of(model, W3, samples=24, length=16), sites)
    (segment,) = list(sweep)
    ((group,),) = [wave.groups for wave in segment.waves]
    moments = GuidedMoments(group, plain)
    segment.feed({group.node: moments.update})
    for site in sites:
        hessians, weight = moments.of(site.name), model.graph.constant(site.weight)
        errors = []
        for context in (guided, plain):
            difference = (weight - context.solutions[site.name].dequantize()).tensor_split(len(hessians))
            errors.append(sum(float(((rows @ h) * rows).sum()) for rows, h in zip(difference, hessians, strict=True)))
        assert errors[0] < errors[1]


def test_experts_need_none():
    model = analysed("mixtral")
    experts = [site for site in model.graph.sites if site.kind == "experts"]
    context = context_of(model, W3, samples=2)
    check_guides("gptq", experts, context)
    Gptq(guided=True, passes=1, select=Select(name="*.layers.0.mlp.experts.down_proj")).run(model.graph, context)
    assert [name for name in context.solutions] == ["model.layers.0.mlp.experts.down_proj"]


def test_what_does_not_go_together_is_refused():
    model = analysed("llama")
    with pytest.raises(UsageError, match="gptq: guided, but 14 layers have no weights of their tokens .*; put the pass guide"):
        Gptq(guided=True).run(model.graph, context_of(model, W3))
    with pytest.raises(ValueError, match="guided and asymmetric do not go together"):
        Gptq(guided=True, asymmetric=True)
    context = context_of(model, {"bits": 8, "group": "tensor"})
    context.guides = {site.name: torch.ones(36, 2) for site in linear_sites(model)}
    with pytest.raises(UsageError, match="has one scale for all of them"):
        Gptq(guided=True).run(model.graph, context)


def test_rows_of_several_matrices_are_one():
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        format = AffineFormat(4, 32, symmetric)
        parts = [affine.fit(rows, format) for rows in weight.tensor_split(4)]
        whole = affine.fit(weight, format)
        assert torch.equal(rows_joined(parts).dequantize(), whole.dequantize())
