"""EM and its parts against their definitions."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics import codebook, vq_tables
from qcompiler.numerics.codebook import Nearest

F64 = torch.float64


def problem(dim=2, groups=3, count=200, seed=0, dtype=F64):
    """Points `[G, d, N]`, positive definite metrics `[d, d, N]` that differ from point to point, weights `[G, N]`."""
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(groups, dim, count, generator=g, dtype=F64).pow(3)
    root = torch.randn(count, dim, dim, generator=g, dtype=F64)
    metric = (root @ root.mT + 0.05 * torch.eye(dim, dtype=F64)).permute(1, 2, 0)
    weights = torch.rand(groups, count, generator=g, dtype=F64) + 0.1
    return points.to(dtype), metric.to(dtype), weights.to(dtype)


def errors_of(points, metric, weights, entries) -> torch.Tensor:
    """`[G, N, K]`, by the definition."""
    difference = points.transpose(1, 2)[:, :, None] - entries[:, None]
    return torch.einsum("gnki,ijn,gnkj,gn->gnk", difference, metric, difference, weights)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_features_and_table_are_the_errors(dim):
    points, metric, weights = problem(dim)
    entries = torch.randn(3, 7, dim, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = codebook.features(points, metric, weights).transpose(1, 2) @ codebook.table(entries)
    torch.testing.assert_close(found, errors_of(points, metric, weights, entries), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [3, 16, 256])
def test_nearest_is_the_least_error(dtype, count, monkeypatch):
    monkeypatch.setattr(codebook, "ELEMENTS", 1000)  # pieces of points, and of groups
    points, metric, weights = problem(2, dtype=dtype)
    entries = torch.randn(3, count, 2, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    features = codebook.features(points, metric, weights)
    assignment, least = Nearest(count, features)(features, codebook.table(entries))
    expected = errors_of(points, metric, weights, entries)
    own = expected.gather(2, assignment[..., None])[..., 0]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9  # the words leave log2 K bits of an error out
    scale = features[:, -1]
    assert (own - expected.amin(2) <= tolerance * scale).all()
    assert ((least - own).abs() <= tolerance * (scale + own)).all()
    assert (assignment == expected.argmin(2)).double().mean() > 0.99


def test_of_equal_entries_the_first_is_nearest():
    points, metric, weights = problem(2)
    entries = torch.zeros(3, 5, 2, dtype=F64)
    features = codebook.features(points, metric, weights)
    assert (Nearest(5, features)(features, codebook.table(entries))[0] == 0).all()


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_entries_are_the_best_of_their_points(dim):
    points, metric, weights = problem(dim)
    assignment = torch.randint(0, 5, (3, 200), generator=torch.Generator().manual_seed(2))
    before = torch.randn(3, 6, dim, dtype=F64)  # the last has no points
    features = codebook.features(points, metric, weights)
    found = codebook.update(codebook.sums(features, assignment, 6), before)
    for group in range(3):
        for entry in range(5):
            own = assignment[group] == entry
            matrix = torch.einsum("ijn,n->ij", metric[..., own], weights[group, own])
            right = torch.einsum("ijn,jn,n->i", metric[..., own], points[group][:, own], weights[group, own])
            torch.testing.assert_close(found[group, entry], torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, 5], before[:, 5], rtol=0, atol=0)


@pytest.mark.parametrize("seeding", ["mahalanobis", "k-means++", "one point"])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_em_never_increases_the_error_and_leaves_no_entry_without_points(dim, seeding):
    points, metric, weights = problem(dim, count=300)
    features = codebook.features(points, metric, weights)
    nearest, count = Nearest(12, features), 12
    if seeding == "mahalanobis":
        start = codebook.seed_mahalanobis(points, count)
    elif seeding == "k-means++":
        start = codebook.seed_plus_plus(points, features, count, torch.Generator().manual_seed(0))
    else:
        start = points[:, :, :1].transpose(1, 2).expand(-1, count, -1).clone()
    entries, history = codebook.em(points, features, start, 60, 0.0, nearest)
    history = history.tolist()
    assert len(history) > 3 and all(b <= a * (1 + 1e-9) for a, b in zip(history, history[1:], strict=False))
    assignment, errors = nearest(features, codebook.table(entries))
    assert errors.sum().item() <= history[-1] * (1 + 1e-9)
    assert all(len(own.unique()) == count for own in assignment)


def test_em_ends_when_it_gains_little_and_runs_on_when_told():
    points, metric, weights = problem()
    features = codebook.features(points, metric, weights)
    start, nearest = codebook.seed_mahalanobis(points, 8), Nearest(8, features)
    lengths = [len(codebook.em(points, features, start, 40, tolerance, nearest)[1]) for tolerance in (0.1, 1e-3, -1.0)]
    assert lengths[0] < lengths[1] < lengths[2] == 40


def test_a_group_ends_by_itself():
    points, metric, weights = problem(groups=9)
    points[4:] *= torch.logspace(0, 2, 200, dtype=F64)  # groups that go on for longer
    features = codebook.features(points, metric, weights)
    start, nearest = codebook.seed_mahalanobis(points, 8), Nearest(8, features)
    whole, _ = codebook.em(points, features, start, 40, 1e-3, nearest)
    alone = [codebook.em(points[g : g + 1], features[g : g + 1], start[g : g + 1], 40, 1e-3, nearest) for g in range(9)]
    assert len({len(history) for _, history in alone}) > 2
    torch.testing.assert_close(whole, torch.cat([entries for entries, _ in alone]), rtol=1e-12, atol=1e-12)


def test_without_reseeding_an_entry_without_points_becomes_zero():
    points, metric, weights = problem()
    features = codebook.features(points, metric, weights)
    start = points[:, :, :4].transpose(1, 2).clone()
    start[:, 3] = 1e6
    entries, _ = codebook.em(points, features, start, 1, -1.0, Nearest(4, features), reseeded=False)
    assert (entries[:, 3] == 0).all() and (entries[:, :3] != 0).all()


def test_mahalanobis_seeds_are_points_the_nearest_and_the_farthest_too():
    points, _, _ = problem(2, count=50)
    seeds = codebook.seed_mahalanobis(points, 5)
    for group in range(3):
        own = points[group]
        assert all((own.T == seed).all(1).any() for seed in seeds[group])
        centred = own - own.mean(1, keepdim=True)
        distance = (torch.linalg.inv(centred @ centred.T) @ centred * centred).sum(0)
        ends = own[:, [distance.argmin(), distance.argmax()]].T
        assert torch.equal(seeds[group, [0, -1]], ends)


def test_constant_points_have_seeds():
    seeds = codebook.seed_mahalanobis(torch.full((2, 2, 9), 3.0), 4)
    assert (seeds == 3).all()


def test_random_seeds_do_not_depend_on_the_other_groups():
    points, metric, weights = problem(count=500)
    features = codebook.features(points, metric, weights)
    draw = lambda p, f: codebook.seed_plus_plus(p, f, 8, torch.Generator().manual_seed(5))  # noqa: E731
    whole = draw(points, features)
    for group in range(3):
        own = slice(group, group + 1)
        assert torch.equal(draw(points[own], features[own]), whole[own])
        assert all((points[group].T == seed).all(1).any() for seed in whole[group])
    assert not torch.equal(codebook.seed_plus_plus(points, features, 8, torch.Generator().manual_seed(6)), whole)


# ---- fixed tables


@pytest.mark.parametrize("name", vq_tables.TABLES)
def test_tables_are_eight_bits_with_a_scale(name):
    table = torch.tensor(vq_tables.TABLES[name], dtype=F64)
    assert len(table) == 16 and table.min() == -1 and table.max() == 1 and 0 in table
    codes, step = vq_tables.entries(table)
    assert codes.dtype == torch.int8 and step.dtype == torch.float16
    errors = (codes.double() * step.double() - table).abs()
    assert errors.max() < 0.5 / 120
    for other in torch.linspace(1 / 127, 2 / 127, 300, dtype=F64).half():
        worse = ((table / other.double()).round().clamp(-128, 127) * other.double() - table).square().sum()
        assert errors.square().sum() <= worse + 1e-15


def test_whole_numbers_are_exact():
    codes, step = vq_tables.entries(torch.arange(-8.0, 8.0)[:, None])
    assert torch.equal(codes.double() * step.double(), torch.arange(-8.0, 8.0, dtype=F64)[:, None])


def test_tables_that_cannot_be():
    for table in (torch.zeros(16), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="finite entries that are not all 0"):
            vq_tables.entries(table)
    with pytest.raises(ValueError, match="no float16 scale"):
        vq_tables.entries(torch.tensor([1e9, -1e9]))


@pytest.mark.parametrize("dim", [3, 4, 8])
def test_inverses_of_many_are_those_of_one_after_another(dim):
    root = torch.randn(50, 3, dim, dim, dtype=F64, generator=torch.Generator().manual_seed(dim))
    matrices = root @ root.mT + 0.01 * torch.eye(dim, dtype=F64)
    found = codebook.inverse_of_many(matrices)
    torch.testing.assert_close(found, torch.cholesky_inverse(torch.linalg.cholesky(matrices)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found @ matrices, torch.eye(dim, dtype=F64).expand_as(matrices), rtol=0, atol=1e-8)
