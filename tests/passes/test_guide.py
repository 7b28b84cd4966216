"""The pass `guide`: weights of mean 1 for every linear layer, the same for the same seed, kept for a resumed run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler import recipe as recipes
from qcompiler.passes.observe.guide import NO_GRADIENT, Guide, normalised, top_share
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select
from qcompiler.sweep.gradients import output_gradients
from qcompiler.sweep.store import SolvedStore, fingerprint
from tests.calibrated import calibrated
from tests.captures import analysed
from tests.sweep.prepared_context import context_of


def _guided(model_type: str = "llama", **options: Any) -> tuple[Any, Any]:
    model = analysed(model_type)
    context = context_of(model)
    return context, Guide(**options).run(model.graph, context)


def test_every_linear_layer_gets_weights_of_mean_one():
    model = analysed("llama")
    context, report = _guided()
    sites = [site for site in model.graph.sites if site.kind == "linear"]
    assert report.changed == report.matched == len(sites) == len(context.guides)
    for site in sites:
        guide = context.guides[site.name]
        assert guide.dtype == torch.float32 and guide.shape == (36, 4) and (guide >= 0).all()
        assert torch.allclose(guide.mean(dim=0), torch.ones(4))
        assert 1 / 36 < report.layers[site.name]["guide_top_share"] <= 1
        # The last token of each of the three texts has no label, and feeds nothing that has one.
        assert report.layers[site.name]["guide_dead_tokens"] == pytest.approx(3 / 36)
    raw = dict((site.name, s) for site, s in output_gradients(model.graph, context, sites))
    assert all(torch.equal(context.guides[name], normalised(s)) for name, s in raw.items())


def test_a_recipe_can_ask_for_it_and_nothing_quantized_is_seen():
    passes = ["round_to_nearest", {"guide": {"groups": 2, "labels": "sampled"}}]
    parsed = recipes.parse({"name": "test", "linear": {"bits": 4, "group": 64}, "passes": passes}, "test")
    assert parsed.passes[1] == Guide(groups=2, labels="sampled")
    model = analysed("llama")
    contexts = [context_of(model), context_of(model)]
    parsed.passes[0].run(model.graph, contexts[0])
    for context in contexts:
        parsed.passes[1].run(model.graph, context)
    assert all(torch.equal(guide, contexts[1].guides[name]) for name, guide in contexts[0].guides.items())


def test_only_what_is_selected():
    context, report = _guided(select=Select(role="mlp.*"))
    assert set(context.guides) == {name for name in context.schemes if ".mlp." in name}
    assert {skip.reason for skip in report.skipped} == {"not selected"}


def test_experts_have_no_guide():
    context, report = _guided("mixtral")
    assert "model.layers.0.self_attn.q_proj" in context.guides
    experts = [skip for skip in report.skipped if "shared out among experts" in skip.reason]
    assert len(experts) == 4 and not any(skip.node in context.guides for skip in experts)


def test_a_layer_without_a_gradient_is_named():
    class Aside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.compared = torch.nn.Linear(96, 8), torch.nn.Linear(96, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) * (self.compared(x) > 0)

    graph, context = calibrated({"bits": 8}, Aside().eval())
    warnings: list[str] = []
    context.reporter.warning = warnings.append  # type: ignore[method-assign]
    report = Guide().run(graph, context)
    assert list(context.guides) == ["used"] and report.matched == 2 and report.changed == 1
    assert [(skip.node, skip.reason) for skip in report.skipped] == [("compared", NO_GRADIENT)]
    assert warnings == [f"guide: {NO_GRADIENT}: compared"]


def test_a_resumed_run_takes_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = analysed("llama")
    first = context_of(model)
    first.store = SolvedStore(tmp_path)
    report = Guide().run(model.graph, first)
    second = context_of(model)
    second.store = SolvedStore(tmp_path)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the gradients were taken anew")

    monkeypatch.setattr("qcompiler.passes.observe.guide.output_gradients", never)
    again = Guide().run(model.graph, second)
    assert again.layers == report.layers and set(second.guides) == set(first.guides)
    assert all(torch.equal(second.guides[name], guide) for name, guide in first.guides.items())
    with pytest.raises(AssertionError, match="taken anew"):
        Guide(groups=2).run(model.graph, second)


def test_what_is_solved_later_is_named_by_the_guide_too():
    """A solved site's file is named by a hash of the recipe, in which the guide and all its options stand."""
    model = analysed("llama")

    def key(**options: Any) -> str:
        context = context_of(model)
        context.recipe = dataclasses.replace(context.recipe, passes=(Guide(**options), *context.recipe.passes))
        return fingerprint(model.graph, context)

    assert len({key(), key(labels="sampled"), key(groups=2), key(labels="sampled", seed=1)}) == 4 and key() == key()


def test_guides_lie_in_the_work_folder(tmp_path: Path):
    model = analysed("llama")
    context = context_of(model)
    context.scratch = tmp_path
    Guide().run(model.graph, context)
    assert len(list(tmp_path.iterdir())) == len(context.guides)


def test_it_runs_in_a_pipeline():
    model = analysed("llama")
    context = context_of(model)
    PassManager(Trace(), verify_each=True).run(model.graph, context, [Guide()])
    assert context.guides


def test_weights_and_their_spread():
    s = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert torch.equal(normalised(s), torch.tensor([[0.5, 1.0], [1.5, 1.0]]))
    assert top_share(torch.ones(200, 3)) == pytest.approx(0.01)
    heavy = torch.zeros(200, 1)
    heavy[17] = 200
    assert top_share(heavy) == 1.0
    with pytest.raises(ValueError, match="groups is 0"):
        Guide(groups=0)
