"""The behaviour of the authors' program: the mode against the published algorithm, and the benchmark's own parts."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

import pytest
import torch

from qcompiler.numerics.gptvq import GptvqOptions, gptvq
from qcompiler.numerics.hessian import layer_loss, second_moment
from qcompiler.numerics.vq_codec import Codec
from qcompiler.numerics.vq_shape import VqGeneral, VqShape
from tools.bench import gptvq as bench
from tools.bench.gptq import random_layer
from tools.bench.gptvq_published import published_gptvq

OFFICIAL = GptvqOptions(mode="official", iterations=30, dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_mode_is_the_published_algorithm(dim, monkeypatch):
    """Weight for weight, where codebooks have their exact scales. (In float16 a first difference makes all others.)"""

    def exact(self, entries):
        steps = entries.abs().amax((1, 2)) / 127
        return (entries / steps[:, None, None]).round(), steps

    monkeypatch.setattr(Codec, "codebooks", exact)
    for seed in range(2):
        layer = random_layer(16, 256, seed)
        weight, hessian = layer.weight.double(), layer.hessian.double()
        published = published_gptvq(weight, hessian, dim, 16, 8, 128, iterations=10)
        shape = VqShape(dim, 16, 8, 128, scales="none", spread=False)
        found = gptvq(weight, hessian, shape, replace(OFFICIAL, iterations=10))
        assert isinstance(found.weight, VqGeneral) and found.loss_before is None
        torch.testing.assert_close(found.weight.dequantize().double(), published, rtol=1e-5, atol=1e-6)


def test_with_scales_of_float16_the_losses_are_alike():
    ratios = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight, x = torch.randn(32, 128, generator=generator), torch.randn(500, 128, generator=generator)
        hessian = second_moment(x @ torch.randn(128, 128, generator=generator)).float()
        found = gptvq(weight, hessian, VqShape(2, 16, 8, 128, scales="none", spread=False), OFFICIAL)
        ratios.append(found.loss_after / layer_loss(weight, published_gptvq(weight, hessian, 2, 16, 8, 128, 30), hessian))
    assert sum(ratios) / 6 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "shape", [VqShape(2, 16, 8, 128, 64, "log4", spread=False), VqShape(2, 16, 16, 128, 128), VqShape(4, 16, 16, 0)]
)
def test_the_mode_has_every_shape_and_loses_more(shape):
    layer = random_layer(32, 250, 0)
    official, ours = gptvq(layer.weight, layer.hessian, shape, OFFICIAL), gptvq(layer.weight, layer.hessian, shape)
    assert ours.loss_after < 0.8 * official.loss_after
    loss = layer_loss(layer.weight, official.weight.dequantize(), layer.hessian.double())
    assert official.loss_after == pytest.approx(loss, rel=1e-3)


def test_the_mode_zeroes_dead_columns():
    layer = random_layer(16, 128, 0)
    layer.hessian[5] = layer.hessian[:, 5] = 0
    shape = VqShape(2, 16, 8, 128, scales="none", spread=False)
    changed = layer.weight.clone()
    changed[:, 5] = 7
    found = [gptvq(weight, layer.hessian, shape, OFFICIAL) for weight in (layer.weight, changed)]
    assert found[0].dead == 1 and torch.equal(found[0].weight.dequantize(), found[1].weight.dequantize())


def test_our_defaults_lose_less():
    for bits, shape in bench.SHAPES.items():
        layer = random_layer(32, 256, 1)
        official = gptvq(layer.weight, layer.hessian, shape, bench.OPTIONS[bench.OFFICIAL])
        ours = gptvq(layer.weight, layer.hessian, shape, bench.OPTIONS[bench.OURS])
        assert ours.loss_after < 0.8 * official.loss_after, bits


def test_the_report_has_every_layer_and_side():
    layer = random_layer(32, 256, seed=0)
    case = bench.measure(layer, "2.125", 1, random.Random(0), list(bench.OPTIONS), published=True)
    assert set(case["sides"]) == {*bench.OPTIONS, bench.PUBLISHED} and case["fallbacks"] == []
    document = bench.report([case, {**case, "layer": "0.mlp"}], argparse.Namespace(bits="2.125", threads=1, repeats=1))
    layers, means = document.blocks[1:]
    assert [row[0] for row in layers.rows] == ["random 32x256", "0.mlp"] and len(means.rows) == 3
    assert all(len(row) == len(table.columns) for table in (layers, means) for row in table.rows)
    ours = document.data["means"][0]["sides"][bench.OURS]
    assert ours["worst"] == pytest.approx(ours["loss"]) and ours["loss"] < 1
