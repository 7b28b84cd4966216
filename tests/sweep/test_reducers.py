"""Streaming statistics equal those of all tokens at once."""

from __future__ import annotations

import torch

from qcompiler.sweep.reducers import AbsMax, AbsMean, Cross, Hessian, Mean, Reservoir


def _stream(k: int = 24) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(403, k, generator=torch.Generator().manual_seed(3))
    return x, list(x.split([1, 100, 0, 290, 12]))


def _fed(reducer, parts):
    for part in parts:
        reducer.update(part)
    return reducer.result()


def test_channel_statistics():
    x, parts = _stream()
    assert torch.equal(_fed(AbsMax(24), parts), x.abs().amax(dim=0))
    assert torch.allclose(_fed(AbsMean(24), parts), x.abs().mean(dim=0), rtol=1e-6)
    assert torch.allclose(_fed(Mean(24), parts), x.double().mean(dim=0), rtol=1e-12, atol=1e-15)


def test_hessian_is_the_mean_outer_product():
    x, parts = _stream()
    expected = x.double().T @ x.double() / len(x)
    assert torch.allclose(_fed(Hessian(24, torch.float64), parts), expected, rtol=1e-12)
    assert torch.allclose(_fed(Hessian(24), parts).double(), expected, rtol=1e-5, atol=1e-6)


def test_cross_is_zero_where_the_streams_agree():
    x, parts = _stream()
    cross = Cross(24)
    for part in parts:
        cross.update(part, part)
    assert not cross.result().any()
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    cross = Cross(24, torch.float64)
    cross.update(x, noisy)
    assert torch.allclose(cross.result(), (noisy - x).double().T @ x.double() / len(x), rtol=1e-6, atol=1e-9)


def test_reservoir_keeps_all_of_little_and_a_seeded_part_of_much():
    x, parts = _stream()
    assert torch.equal(_fed(Reservoir(24, 500), parts), x)
    first, again, other = (_fed(Reservoir(24, 50, seed), parts) for seed in (1, 1, 2))
    assert first.shape == (50, 24)
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = {tuple(row) for row in x.tolist()}
    assert all(tuple(row) in rows for row in first.tolist())


def test_reservoir_is_uniform():
    hits = torch.zeros(200)
    numbers = torch.arange(200.0)[:, None]
    for seed in range(400):
        reservoir = Reservoir(1, 20, seed)
        for part in numbers.split(33):
            reservoir.update(part)
        kept = reservoir.result().flatten().long()
        assert kept.unique().numel() == 20
        hits[kept] += 1
    # 400 draws of 20 in 200: 40 each, standard deviation 6; both halves of the stream equally often
    assert hits.max() < 40 + 5 * 6 and hits.min() > 40 - 5 * 6
    assert abs(hits[:100].mean() - hits[100:].mean()) < 3
