"""The built-in recipes with static and with mixed activations, pass by pass and as rewritten graphs."""

from __future__ import annotations

import pytest
import torch

from qcompiler import recipe as recipes
from qcompiler.graph.constants import attribute
from qcompiler.passes import pipeline
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe import to_dict
from tests.calibrated import batches, block, calibrated


def compiled(name: str, samples: list[torch.Tensor]):
    recipe = recipes.load(name)
    given = {key: value for key, value in to_dict(recipe).items() if key not in ("linear", "name", "passes")}
    graph, context = calibrated(to_dict(recipe)["linear"], samples=samples, **given)
    trace = Trace()
    manager = PassManager(trace, verify_each=True)
    manager.run(graph, context, recipe.passes)
    manager.run(graph, context, pipeline(recipe, fuse=False)[1])
    return graph, context, trace


def relative_error(graph, x: torch.Tensor) -> float:
    with torch.no_grad():
        (found,), expected = torch.utils._pytree.tree_leaves(graph.module(x=x)), block()(x)
    return ((found - expected).square().sum() / expected.square().sum()).sqrt().item()


def test_static_ranges_end_as_constants():
    graph, context, trace = compiled("int8-static", batches())
    names = ["round_to_nearest", "place_observers", "calibrate_ranges", "bias_correction", "quantize_sites"]
    assert [entry.record["name"] for entry in trace.entries] == names
    assert "qcompiler.observe" in trace.entries[1].text
    assert all("qcompiler.observe" not in entry.text for entry in trace.entries[2:])
    scales = {
        name: attribute(graph.module, name).item() for name in graph.module.state_dict() if name.endswith("activation_scale")
    }
    assert {name.removesuffix(".activation_scale") for name in scales} == {site.name for site in graph.sites}
    assert all(scales[f"{name}.activation_scale"] == scale for name, (scale, _) in context.static_ranges.items())
    assert scales["q.activation_scale"] <= max(x.abs().max().item() for x in batches()) / 127
    assert relative_error(graph, torch.cat(batches(seed=5))) < 0.05
    assert {"activation_range", "mean_error_before", "weight_sqnr_db"} <= trace.layers()["down"].keys()


def test_mixed_is_nearer_than_plain_where_there_are_outliers():
    """One column of 96 is 100 times as large as the rest: rounded with it, they have a code or two left."""

    def spiked(seed: int) -> list[torch.Tensor]:
        samples = batches(seed=seed)
        for x in samples:
            x[:, 40] *= 100
        return samples

    mixed, context, trace = compiled("int8-mixed", spiked(0))
    plain, _, _ = compiled("int8", spiked(0))
    assert context.outliers["q"].tolist() == [40] and trace.layers()["q"]["outlier_columns"] == 1
    assert not trace.entries[0].record["fallbacks"]
    held_out = torch.cat(spiked(5))
    assert relative_error(mixed, held_out) < 0.5 * relative_error(plain, held_out)


@pytest.mark.parametrize("name", ["int8-static", "int8-mixed"])
def test_the_same_samples_give_the_same_bits(name):
    first, second = (compiled(name, batches())[0].module.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
