"""Gradients of the whole model by segments are those of the whole model at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from qcompiler.errors import CapacityError, InputError, UsageError
from qcompiler.passes.observe.place_observers import PlaceObservers
from qcompiler.pipeline.context import Context
from qcompiler.report.progress import Silent
from qcompiler.sweep.backward import Backward
from qcompiler.sweep.ends import find_ends
from qcompiler.sweep.gradients import output_gradients, row_groups
from qcompiler.sweep.losses import NextToken, end_loss
from qcompiler.sweep.reducers import GuidedHessians, Hessian
from tests.calibrated import calibrated
from tests.captures import Analysed, analysed
from tests.sweep.prepared_context import context_of

GROUPS = 4
# A decoder, one with a tied head behind a bend, a mixture, and an encoder with two outputs.
TYPES = ["llama", "gemma2", "mixtral", "bert"]


def _sites(model: Analysed) -> list[Any]:
    return [site for site in model.graph.sites if site.kind == "linear"]


def _by_site(model: Analysed, context: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {site.name: s for site, s in output_gradients(model.graph, context, _sites(model), groups=GROUPS, **options)}


def _module_gradients(model: Analysed, context: Any, loss: Any) -> dict[str, torch.Tensor]:
    """The same from the module's own forward pass and one call of autograd a sample."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def taken(_module: Any, _given: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return taken

    modules = dict(model.model.named_modules())
    hooks = [modules[site.name].register_forward_hook(hook(site.name)) for site in _sites(model)]
    found: dict[str, list[torch.Tensor]] = {site.name: [] for site in _sites(model)}
    for sample in context.samples():
        total = loss(sample, model.model(input_ids=sample["input_ids"], attention_mask=sample.get("attention_mask")))
        names = list(outputs)
        for name, gradient in zip(names, torch.autograd.grad(total, [outputs[n] for n in names]), strict=True):
            rows = gradient.reshape(-1, gradient.shape[-1]).double()
            parts = rows.square().split(rows.shape[1] // GROUPS, dim=1)
            found[name].append(torch.stack([part.mean(dim=1) for part in parts], dim=1))
    for handle in hooks:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _cross_entropy(sample: dict[str, Any], output: Any) -> torch.Tensor:
    ids = sample["input_ids"]
    return functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum")


def _close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, s in found.items():
        assert expected[name].any(), name
        assert (s - expected[name]).norm() <= relative * expected[name].norm(), name


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, s in found.items():
        assert s.any() and torch.equal(s, expected[name]), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradients_are_those_of_the_module(model_type: str):
    model = analysed(model_type)
    context = _unequal(model)
    _close(_by_site(model, context), _module_gradients(model, context, _cross_entropy))


def test_without_logits_the_outputs_are_projected_on_noise():
    model = analysed("bert")
    context = context_of(model)
    generator = torch.Generator().manual_seed(3)

    def projection(_sample: Any, output: Any) -> torch.Tensor:
        values = (output.last_hidden_state, output.pooler_output)
        return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)

    _close(_by_site(model, context, seed=3), _module_gradients(model, context, projection))


def _unequal(model: Analysed) -> Any:
    """Samples of different lengths."""
    short, long = context_of(model, samples=1, length=5), context_of(model, samples=2, length=12)
    feeds = [*short.samples(), *long.samples()]
    long.samples = lambda: feeds
    return long


@pytest.mark.parametrize("model_type", TYPES)
def test_many_segments_give_what_one_does(model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = analysed(model_type)
    context = _unequal(model)
    pieces = Backward(model.graph, context, _sites(model), end_loss(model.graph, _labels(model_type), 0))
    assert len(pieces.stretches) >= 3
    found = _by_site(model, context, labels=_labels(model_type))
    with monkeypatch.context() as patched:
        patched.setattr("qcompiler.sweep.backward_plan.good_cuts", lambda order: [])
        whole = Backward(model.graph, context, _sites(model), end_loss(model.graph, _labels(model_type), 0))
        assert len(whole.stretches) == 1
        _equal(found, _by_site(model, context, labels=_labels(model_type)))
    with monkeypatch.context() as patched:
        patched.setattr("qcompiler.sweep.backward_plan.good_cuts", lambda order: order.cuts)
        finest = Backward(model.graph, context, _sites(model), end_loss(model.graph, _labels(model_type), 0))
        assert len(finest.stretches) > len(pieces.stretches)
        _equal(found, _by_site(model, context, labels=_labels(model_type)))


def _labels(model_type: str) -> str:
    return "sampled" if model_type == "bert" else "text"


def test_a_budget_cuts_and_spills_and_changes_no_bit(tmp_path: Path):
    model = analysed("llama")
    free = _by_site(model, context_of(model))
    tight = context_of(model)
    tight.memory = _smallest(model)
    with pytest.raises(CapacityError, match="no folder to keep them in"):
        _by_site(model, tight)
    tight.scratch = tmp_path
    run = Backward(model.graph, tight, _sites(model), end_loss(model.graph, "text", 0))
    assert run._plan.spill
    found = _by_site(model, tight)
    _equal(found, free)
    assert not list(tmp_path.iterdir())


def _smallest(model: Analysed) -> int:
    context = context_of(model)
    context.memory = 1000
    with pytest.raises(CapacityError, match="a memory budget of 1,000 bytes is too small: gradients through .* alone") as error:
        _by_site(model, context)
    return int(str(error.value).rpartition(" is ")[2].split()[0].replace(",", ""))


def test_labels_that_are_drawn_follow_their_seed():
    model = analysed("llama")
    context = context_of(model, samples=2)
    one, again, other = (_by_site(model, context, labels="sampled", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_drawn_labels_give_the_second_order_of_the_divergence():
    """E over labels of (∂l/∂z)² at the logits is p (1 − p), the diagonal of the Fisher matrix of a softmax."""
    model = analysed("llama")
    context = context_of(model, samples=1, length=4)
    (head,) = [site for site in model.graph.sites if site.role == "head"]
    draws = [
        next(output_gradients(model.graph, context, [head], groups=1, labels="sampled", seed=seed))[1] for seed in range(60)
    ]
    with torch.no_grad():
        p = model.model(**{"input_ids": next(iter(context.samples()))["input_ids"]}).logits[0].double().softmax(-1)
    expected = (p * (1 - p)).mean(dim=-1)
    assert torch.allclose(torch.stack(draws).mean(dim=0)[:, 0], expected, rtol=0.05)


def test_padding_has_no_label_and_the_last_token_none_in_a_text():
    model = analysed("llama")
    context = context_of(model, samples=1, length=8)
    (sample,) = context.samples()
    logits = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = NextToken(find_ends(model.graph))
    ids = torch.arange(8)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    loss({"input_ids": ids, "attention_mask": mask}, [logits]).backward()
    reached = logits.grad.abs().sum(dim=-1)[0] > 0
    assert reached.tolist() == [False, False, True, True, True, True, False, False] and loss.labelled == 4
    s = _by_site(model, context)["lm_head"]
    assert (s[:-1] > 0).all() and not s[-1].any()


def test_later_sites_alone_need_nothing_before_them():
    model = analysed("llama")
    context = context_of(model)
    everything = _by_site(model, context)
    chosen = [site for site in _sites(model) if site.name.endswith("layers.1.mlp.down_proj")]
    ((site, s),) = output_gradients(model.graph, context, chosen, groups=GROUPS)
    assert torch.equal(s, everything[site.name])


def test_a_site_that_the_loss_does_not_depend_on_has_none():
    class Aside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.compared = torch.nn.Linear(96, 8), torch.nn.Linear(96, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) * (self.compared(x) > 0)

    graph, context = calibrated({"bits": 8}, Aside().eval())
    found = {site.name: s for site, s in output_gradients(graph, context, graph.sites, groups=2)}
    assert found["compared"] is None and found["used"] is not None and found["used"].shape == (128, 2)


def test_what_cannot_be_measured_is_refused():
    llama, bert = analysed("llama"), analysed("bert")
    empty = Context(context_of(llama).recipe, Silent())
    with pytest.raises(UsageError, match="need calibration samples"):
        _by_site(llama, empty)
    with pytest.raises(UsageError, match="no token of the 3 calibration samples has a label"):
        _by_site(llama, context_of(llama, length=1))
    broken = context_of(bert)
    site = bert.graph.site("encoder.layer.0.output.dense")
    held = bert.graph.constant(site.weight)
    try:
        bert.graph.set_constant(site.weight, held * float("inf"))
        with pytest.raises(InputError, match="loss of calibration sample 0 is nan"):
            _by_site(bert, broken)
    finally:
        bert.graph.set_constant(site.weight, held)


def test_observed_values_pass_gradients():
    graph, context = calibrated({"bits": 8, "activations": "int8-static"})
    before = {site.name: s for site, s in output_gradients(graph, context, graph.sites)}
    report = PlaceObservers().run(graph, context)
    assert report.changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = {site.name: s for site, s in output_gradients(graph, context, graph.sites)}
    _equal(after, before)


def test_parts_of_the_outputs_are_consecutive_and_whole():
    assert row_groups(8, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [part.stop - part.start for part in row_groups(10, 4)] == [len(part) for part in torch.arange(10).tensor_split(4)]
    assert row_groups(2, 4) == [slice(0, 1), slice(1, 2)]


def test_guided_by_ones_is_plain_and_by_numbers_is_weighted():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 24, generator=generator) for rows in (7, 30, 1)]
    plain, guided = Hessian(24), GuidedHessians(24, 3, torch.ones(38, 3))
    guide = torch.rand(38, 2, generator=generator)
    guide[4] = 0
    weighted = GuidedHessians(24, 2, guide, dtype=torch.float64)
    for x in batches:
        for reducer in (plain, guided, weighted):
            reducer.update(x)
    h = plain.result()
    assert len(guided.result()) == 3 and all(torch.equal(each, h) for each in guided.result())
    x = torch.cat(batches).double()
    for group, each in enumerate(weighted.result()):
        expected = (x * guide[:, group, None]).T @ x / 38
        assert torch.allclose(each, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(each, each.T) and torch.linalg.eigvalsh(each)[0] > -1e-12


def test_a_guide_of_other_samples_is_refused():
    with pytest.raises(ValueError, match=r"is \[tokens, 2\], found \[5, 3\]"):
        GuidedHessians(8, 2, torch.ones(5, 3))
    reducer = GuidedHessians(8, 1, torch.ones(5, 1))
    reducer.update(torch.ones(4, 8))
    with pytest.raises(ValueError, match="a guide of 5 tokens, found 4"):
        reducer.result()
    with pytest.raises(ValueError, match="a guide of 5 tokens, found more"):
        reducer.update(torch.ones(2, 8))
