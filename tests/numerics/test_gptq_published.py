"""The published algorithm as the benchmark has it, and the benchmark's own parts."""

from __future__ import annotations

import argparse
import random

import pytest
import torch

from qcompiler.numerics import affine
from qcompiler.numerics.gptq import GptqOptions, gptq
from qcompiler.numerics.hessian import layer_loss
from qcompiler.ops.formats import AffineFormat
from tools.bench import gptq as bench
from tools.bench.gptq_published import published_gptq


def test_both_derivations_are_one_algorithm():
    """With the inverse's factor, or with the factor alone: the losses differ by what float16 scales cost."""
    layer = bench.random_layer(48, 256, seed=0)
    for bits in (4, 3):
        published = published_gptq(layer.weight, layer.hessian, bits, 128)
        ours = gptq(layer.weight, layer.hessian, AffineFormat(bits, 128, False), bench.OURS["same grid"])
        loss = layer_loss(layer.weight, published, layer.hessian)
        assert ours.loss_after == pytest.approx(loss, rel=0.03)
        nearest = affine.fit(layer.weight, AffineFormat(bits, 128, False), "minmax").dequantize()
        assert loss < 0.5 * layer_loss(layer.weight, nearest, layer.hessian)


def test_our_defaults_lose_less():
    for seed in range(3):
        layer = bench.random_layer(32, 256, seed)
        published = layer_loss(layer.weight, published_gptq(layer.weight, layer.hessian, 4, 128), layer.hessian)
        assert gptq(layer.weight, layer.hessian, AffineFormat(4, 128, False), GptqOptions()).loss_after < 0.9 * published


def test_the_report_has_every_layer_and_side():
    layer = bench.random_layer(8, 128, seed=0)
    case = bench.measure(layer, 4, 1, random.Random(0))
    assert set(case["sides"]) == {bench.PUBLISHED, *bench.OURS} and case["fallbacks"] == []
    chosen = argparse.Namespace(threads=1, repeats=1)
    document = bench.report([case, {**case, "layer": "0.mlp"}], chosen)
    layers, sums = document.blocks[1:]
    assert [row[0] for row in layers.rows] == ["random 8x128", "0.mlp"] and [row[0] for row in sums.rows] == ["sum of 1"]
    assert all(len(row) == len(table.columns) for table in (layers, sums) for row in table.rows)
    assert torch.isfinite(torch.tensor(document.data["sums"][0]["worst"]["defaults"]))
