"""The sweep shows every site the input that the whole graph would show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Interpreter, Node

from qcompiler.errors import CapacityError, InputError, UsageError
from qcompiler.numerics import affine
from qcompiler.sweep.budget import Costs
from qcompiler.sweep.order import good_cuts, order
from qcompiler.sweep.product import product
from qcompiler.sweep.sizes import bindings, node_bytes
from qcompiler.sweep.sweep import Sweep
from tests.captures import Analysed, analysed
from tests.sweep.prepared_context import context_of, linear_sites

# A decoder, one whose attention and feed-forward read one norm, and an encoder with norms behind its residuals.
TYPES = ["llama", "gpt_neox", "bert"]


class _Whole(Interpreter):
    """The whole graph on one sample, some sites' products replaced; keeps every node's value."""

    def __init__(self, model: Analysed, products: dict[Node, Any]):
        super().__init__(model.graph.module, garbage_collect_values=False)
        self.products = products
        self.values: dict[Node, Any] = {}

    def run_node(self, node: Node) -> Any:
        given = self.products.get(node)
        if given is None:
            self.values[node] = super().run_node(node)
        else:
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            self.values[node] = given(arguments[0], None, *arguments[2:])
        return self.values[node]


def _whole(model: Analysed, context: Any, products: dict[Node, Any], sample: int = -1) -> dict[Node, Any]:
    run = _Whole(model, products)
    with torch.no_grad():
        run.run(*torch.utils._pytree.tree_leaves(list(context.samples())[sample]))
    return run.values


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


@pytest.mark.parametrize("model_type", TYPES)
def test_waves_follow_the_data(model_type: str):
    model = analysed(model_type)
    sweep = Sweep(model.graph, context_of(model), linear_sites(model))
    seen: set[Node] = set()
    order_of = {site.name: number for number, wave in enumerate(sweep.order.waves) for site in wave.sites}
    assert sorted(order_of) == sorted(site.name for site in linear_sites(model))
    for site in linear_sites(model):
        before = {other.name for other in linear_sites(model) if _reaches(other.node, site.node)}
        assert all(order_of[name] < order_of[site.name] for name in before), site.name
    for stretch in sweep.stretches:
        assert not seen & set(stretch.nodes)
        for node in stretch.nodes:
            earlier = seen | set(stretch.nodes)
            assert all(i in earlier for i in node.all_input_nodes if i.op not in ("placeholder", "get_attr"))
        seen |= set(stretch.nodes)
    assert seen == set(sweep.order.nodes)
    assert len(sweep.stretches) >= 2


def _reaches(start: Node, end: Node) -> bool:
    queue, seen = [start], {start}
    while queue:
        for user in queue.pop().users:
            if user is end:
                return True
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return False


@pytest.mark.parametrize("model_type", TYPES)
def test_float_inputs_are_those_of_the_whole_graph(model_type: str):
    model = analysed(model_type)
    context = context_of(model)
    expected = _whole(model, context, {})
    taken: dict[Node, list[torch.Tensor]] = {}
    for segment in Sweep(model.graph, context, linear_sites(model)):
        for wave in segment.waves:
            nodes = [group.node for group in wave.groups] + [site.node for site in wave.sites]
            segment.feed({node: taken.setdefault(node, []).append for node in nodes})
    assert len(taken) >= len(linear_sites(model))
    for node, values in taken.items():
        assert len(values) == 3
        assert torch.equal(values[-1], _rows(expected[node])), node.name


@pytest.mark.parametrize("spilled", [False, True])
def test_later_sites_see_quantized_predecessors(spilled: bool, tmp_path: Path):
    model = analysed("llama")
    context = context_of(model)
    context.scratch = tmp_path
    context.solutions.folder = tmp_path
    if spilled:
        context.memory = _smallest(model)
    taken: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    sites = linear_sites(model)
    for segment in (sweep := Sweep(model.graph, context, sites, float_stream=True)):
        for wave in segment.waves:
            for group in wave.groups:

                def tap(x: torch.Tensor, x_float: torch.Tensor, names: tuple = group.sites) -> None:
                    taken.update({site.name: x for site in names})
                    floats.update({site.name: x_float for site in names})

                segment.feed({group.node: tap})
            for site in wave.sites:
                weight = model.graph.constant(site.weight)
                segment.place(site, affine.fit(weight, context.schemes[site.name].weight_format, "minmax"))
    assert sweep._plan.spill is spilled
    quantized = _whole(model, context, {site.node: product(model.graph, site, context) for site in sites})
    plain = _whole(model, context, {})
    for site in sites:
        source = site.node.args[0]
        assert torch.equal(taken[site.name], _rows(quantized[source])), site.name
        assert torch.equal(floats[site.name], _rows(plain[source])), site.name


def _smallest(model: Analysed) -> int:
    """The budget that the refusal of a hopeless one names."""
    context = context_of(model)
    context.memory = 1000
    with pytest.raises(CapacityError, match="the smallest budget for this model and recipe is") as refusal:
        Sweep(model.graph, context, linear_sites(model), float_stream=True)
    return int(str(refusal.value).rpartition(" is ")[2].split()[0].replace(",", ""))


def test_the_smallest_budget_is_enough_and_one_byte_less_is_not(tmp_path: Path):
    model = analysed("llama")
    context = context_of(model)
    context.scratch = tmp_path
    costs = Costs(lambda group: 4 * group.k * group.k)
    context.memory = 1000
    with pytest.raises(CapacityError) as refusal:
        Sweep(model.graph, context, linear_sites(model), costs=costs)
    least = int(str(refusal.value).rpartition(" is ")[2].split()[0].replace(",", ""))
    context.memory = least
    Sweep(model.graph, context, linear_sites(model), costs=costs)
    context.memory = int(least * 0.99)
    with pytest.raises(CapacityError):
        Sweep(model.graph, context, linear_sites(model), costs=costs)
    # Without a folder what lives between segments has to fit as well: never beyond the budget without a word.
    context.memory, context.scratch = least, None
    with pytest.raises(CapacityError, match="no folder to keep them in"):
        Sweep(model.graph, context, linear_sites(model), costs=costs)


def test_sizes_come_from_the_samples():
    model = analysed("llama")
    context = context_of(model, length=12)
    values = _whole(model, context, {})
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    bound = bindings(placeholders, torch.utils._pytree.tree_leaves(list(context.samples())[-1]))
    for site in linear_sites(model):
        assert node_bytes(site.node, bound) == values[site.node].nbytes


def test_cuts_lie_where_the_residual_stream_alone_lives():
    model = analysed("llama")
    sweep = Sweep(model.graph, context_of(model), linear_sites(model))
    found = order(model.graph, linear_sites(model), lambda node: node_bytes(node, sweep.bound))
    narrow = good_cuts(found, 1.05)
    # Two layers: behind both attentions and between the layers.
    assert len(narrow) == 3
    for stretch in found.stretches(narrow)[:-1]:
        shapes = [n.meta["val"].shape for n in stretch.outputs if isinstance(n.meta["val"], torch.Tensor)]
        hidden = [shape for shape in shapes if len(shape) == 3 and shape[-1] == 256]
        assert len(hidden) == 1


def test_without_samples_there_is_nothing_to_sweep():
    model = analysed("llama")
    context = dataclasses.replace(context_of(model), samples=tuple)
    with pytest.raises(UsageError, match="needs calibration samples"):
        Sweep(model.graph, context, linear_sites(model))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_value_that_is_no_number_names_layer_and_sample(value: float, word: str):
    model = analysed("llama")
    context = context_of(model)
    site = next(s for s in linear_sites(model) if s.role == "mlp.up")
    sweep = Sweep(model.graph, context, linear_sites(model))
    with pytest.raises(InputError, match=rf"{site.name}.*holds {word} in calibration sample 0") as refusal:
        for segment in sweep:
            for wave in segment.waves:
                if site in wave.sites:
                    source = next(s for s in linear_sites(model) if s.role == "attn.o").node
                    segment._products[source] = lambda x, *_: torch.full_like(x, value)
                    group = next(g for g in wave.groups if site in g.sites)
                    previous = next(n for n in segment._stretch.nodes if n.target is torch.ops.aten.mul.Tensor)
                    segment._products[previous] = lambda *_: torch.full((1, 12, 256), value)
                    segment.feed({group.node: lambda x: None})
    assert refusal.value.exit_code == 3
