"""Sums by cluster: those of the CPU, and on another device the same numbers without an op that adds in no fixed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.numerics import codebook
from qcompiler.numerics.clusters import Clusters, cumulative
from tests.sweep.other_device import NAME, OtherDevice

# As torch.use_deterministic_algorithms has it, of what solvers might use; bincount with weights, cumsum of one float row.
ATOMIC = {"scatter_add", "scatter_add_", "index_add", "index_add_", "histc", "put_"}


class Refuse(TorchDispatchMode):
    """What adds in no fixed order on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ATOMIC, name
        assert name != "bincount" or len(args) < 2 or args[1] is None, "bincount with weights"
        if name == "cumsum" and args[0].is_floating_point():
            assert args[0].shape[args[1]] < args[0].numel(), "cumsum of a single row"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 7, 300])
def test_sums_on_another_device_have_the_same_bits(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    index = torch.randint(0, count, (5000,), generator=generator)
    index[index == count // 2] = 0  # one that has none
    values = torch.randn(5000, generator=generator)
    here = Clusters(index, count).sums(values)
    expected = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values.double())
    torch.testing.assert_close(here.double(), expected, rtol=1e-5, atol=1e-5)
    with OtherDevice(), Refuse():
        there = Clusters(index.to(NAME), count).sums(values.to(NAME)).cpu()
    assert torch.equal(there, here) and there.dtype == torch.float32


def test_features_of_clusters_have_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    features, assignment = torch.randn(3, 6, 800, generator=generator), torch.randint(0, 16, (3, 800), generator=generator)
    here = codebook.sums(features, assignment, 16)
    with OtherDevice(), Refuse():
        there = codebook.sums(features.to(NAME), assignment.to(NAME), 16).cpu()
    assert here.shape == (3, 6, 16) and torch.equal(there, here)


@pytest.mark.parametrize("rows", [1, 2])
def test_running_sums_of_one_row_are_those_of_several(rows: int) -> None:
    values = torch.rand(rows, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with OtherDevice(), Refuse():
        there = cumulative(values.to(NAME)).cpu()
    assert torch.equal(there, cumulative(values)) and there.shape == values.shape


def test_what_adds_in_no_fixed_order_is_found() -> None:
    with Refuse(), pytest.raises(AssertionError, match="index_add"):
        torch.zeros(2).index_add_(0, torch.tensor([0, 0]), torch.ones(2))
    with Refuse(), pytest.raises(AssertionError, match="single row"):
        torch.ones(1, 5).cumsum(1)


@pytest.mark.parametrize("label", ["vq2", "vq2-4d"])
def test_a_whole_solve_adds_in_a_fixed_order(label: str) -> None:
    from qcompiler.numerics.gptvq import GptvqOptions, gptvq
    from tools.bench.gptvq import shape_of

    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(512, 256, generator=generator)
    hessian = x.T @ x / 512
    here = gptvq(weight, hessian, shape_of(label), GptvqOptions())
    with OtherDevice(), Refuse():
        there = gptvq(weight.to(NAME), hessian.to(NAME), shape_of(label), GptvqOptions())
        indices = there.weight.indices.cpu()
    assert torch.equal(indices, here.weight.indices) and there.loss_after == here.loss_after
