"""The sweep and the moves inside a block against their definitions: exact identities, GPTQ, dense solutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompiler.numerics.codebook import Nearest
from qcompiler.numerics.damping import Factor, factorise
from qcompiler.numerics.hessian import second_moment
from qcompiler.numerics.ordering import order_columns
from qcompiler.numerics.sweep import Grids
from qcompiler.numerics.sweep import sweep as gptq_sweep
from qcompiler.numerics.vq_block import Block, Form, solve_codebooks, solve_scales, visit
from qcompiler.numerics.vq_codec import Codec
from qcompiler.numerics.vq_plan import plan
from qcompiler.numerics.vq_shape import VqShape
from qcompiler.numerics.vq_sweep import Rows, Solved, Tuning
from qcompiler.ops.formats import AffineFormat

F64 = torch.float64
SHAPES = {
    1: VqShape(1, 8, 4, 32, 16),
    2: VqShape(2, 16, 4, 32, 16),
    4: VqShape(4, 32, 8, 32, 0),
    "side by side": VqShape(2, 16, 4, 24, scales="none", codebooks="fp16", spread=False),
    "all": VqShape(2, 16, 0, 0, 8),
}


def problem(n=16, k=80, tokens=300, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[n, k]` that float32 holds, and the second moment of correlated inputs, both float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=F64) * torch.logspace(0, -1.5, k, dtype=F64)[:, None]
    x = torch.randn(tokens, k, generator=generator, dtype=F64) @ mix
    return torch.randn(n, k, generator=generator).double(), second_moment(x)


class Problem:
    """A weight in the order of a sweep, transposed, and all that solves it; `damped` is H + δ, in that order too."""

    def __init__(self, shape: VqShape, ordering="activation", table=None, n=16, k=80, rounds=0, passes=0, seed=0) -> None:
        weight, hessian = problem(n, k, seed=seed)
        self.layout = plan(hessian.diagonal(), shape, ordering, table is not None)
        padding = len(self.layout.permutation) - k
        weight = torch.nn.functional.pad(weight, (0, padding))
        hessian = torch.block_diag(hessian, torch.eye(padding, dtype=F64))
        factor = factorise(hessian, 0.01, 0.0, self.layout.permutation, F64)
        assert isinstance(factor, Factor)
        self.upper = factor.upper
        self.columns = weight[:, self.layout.permutation].T.contiguous()
        self.damped = factor.upper @ factor.upper.T
        rows = shape.rows or n
        if n % rows:
            self.columns = torch.nn.functional.pad(self.columns, (0, rows - n % rows))
        tuning = Tuning(40, 1e-4, "k-means++", rounds, passes, 6)
        codec = replace(Codec.of(shape, weight, table), scale_unit=1.0, codebook_unit=1.0)
        generator = torch.Generator().manual_seed(0)
        self.rows = Rows(self.columns, n, n if table is not None else rows, self.layout, codec, tuning, generator)

    def solve(self) -> Solved:
        return self.rows.sweep(self.upper)

    def losses(self, difference: torch.Tensor) -> torch.Tensor:
        return (difference * (self.damped @ difference)).sum(0)


def textbook(problem: Problem, solved: Solved) -> tuple[torch.Tensor, torch.Tensor]:
    """The sweep with U = R⁻¹ and known codebooks and scales, one vector and one row at a time: its W̃ and E `[k', n]`."""
    u = torch.linalg.inv(problem.upper)
    live, made, errors = problem.columns.clone(), torch.zeros_like(problem.columns), torch.zeros_like(problem.columns)
    dim, k = problem.rows.shape.dim, problem.rows.layout.permutation
    real = (k < 80).to(F64)
    for span, coded in zip(problem.layout.spans, solved.blocks, strict=True):
        for vector, start in enumerate(range(span.start, span.stop, dim)):
            own = slice(start, start + dim)
            counted = real[own]
            metric = torch.linalg.inv(u[own, own].T @ u[own, own]) * counted * counted[:, None]
            for row in range(live.shape[1]):
                scale = coded.block.scales[span.group[vector], row]
                entries = scale * coded.block.entries[row // problem.rows.rows] * counted
                missed = live[own, row] - entries
                best = ((missed @ metric) * missed).sum(1).argmin()
                made[own, row] = entries[best]
                errors[own, row] = (live[own, row] - entries[best]) @ torch.linalg.inv(u[own, own])
            live[start + dim :] -= u[own, start + dim :].T @ errors[own]
    return made, errors


@pytest.mark.parametrize("ordering", ["none", "activation"])
@pytest.mark.parametrize("kind", SHAPES)
def test_all_errors_together_are_the_difference(kind, ordering):
    """The textbook's vectors, D = E U and ‖E‖² = tr(D (H + δ) Dᵀ)."""
    some = Problem(SHAPES[kind], ordering)
    solved = some.solve()
    made, errors = textbook(some, solved)
    torch.testing.assert_close(some.columns - solved.difference, made, rtol=0, atol=1e-10)
    torch.testing.assert_close(solved.difference, torch.linalg.inv(some.upper).T @ errors, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(errors.square().sum(0), some.losses(solved.difference), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [2, 4])
def test_columns_of_padding_count_nothing(dim):
    """70 columns in vectors that cover 72 or 80; the vectors that hold them are chosen by the others."""
    shape = VqShape(dim, 16, 8, 32, 16)
    some = Problem(shape, k=70)
    solved = some.solve()
    assert any(span.real is not None for span in some.layout.spans)
    padding = some.layout.permutation >= 70
    assert padding.any() and (solved.difference[padding] == 0).all()
    before = some.losses(solved.difference)
    some.rows.tuning = replace(some.rows.tuning, rounds=2)
    again = some.rows.sweep(some.upper)
    assert (again.difference[padding] == 0).all() and some.losses(again.difference).sum() < before.sum()


@pytest.mark.parametrize("group", [16, 0])
def test_one_column_and_a_uniform_grid_are_gptq(group):
    """Bit for bit: the same codes, with the scales that the sweep found on its way."""
    shape = VqShape(1, 16, 0, 0, group)
    some = Problem(shape, "none", torch.arange(-8.0, 8.0)[:, None])
    solved = some.solve()
    step = solved.blocks[0].steps[0]
    scales = torch.empty(shape.groups(80), 16, dtype=F64)
    for span, coded in zip(some.layout.spans, solved.blocks, strict=True):
        scales[span.groups] = coded.block.scales * step
    grid = solved.blocks[0].codes[0, :, 0] / solved.blocks[0].codes[0, -1, 0] * 7
    assert torch.equal(grid, torch.arange(-8.0, 8.0, dtype=F64))
    scales *= solved.blocks[0].codes[0, -1, 0] / 7
    format = AffineFormat(4, 0)
    order = order_columns(torch.ones(80), "none", group, 32)
    expected = gptq_sweep(some.columns, some.upper, order, format, Grids(scales, torch.full_like(scales, 8), format))
    codes = torch.cat([coded.block.indices for coded in solved.blocks])
    assert torch.equal(codes.to(torch.uint8), expected.codes)


def test_codebooks_that_hold_every_vector_have_no_error():
    values = torch.randn(40, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    some = Problem(VqShape(2, 64, 4, 32, scales="none", codebooks="fp16"))
    chosen = torch.randint(0, 40, (some.columns.shape[0] // 2, 16), generator=torch.Generator().manual_seed(1))
    some.rows.columns = values.half().double()[chosen].permute(0, 2, 1).reshape(some.columns.shape)
    some.columns = some.rows.columns
    solved = some.solve()
    assert solved.difference.abs().max() < 1e-10


# ---- moves in a block


def block_problem(dim=2, groups=2, rows=3, vectors=6, count=5, seed=0):
    """A block, a form and q, all float64; x `[w, n]`."""
    g = torch.Generator().manual_seed(seed)
    n, width = groups * rows, vectors * dim
    root = torch.randn(width, width, generator=g, dtype=F64)
    form = Form(root @ root.T + 0.1 * torch.eye(width, dtype=F64), dim)
    entries = torch.randn(groups, count, dim, generator=g, dtype=F64)
    indices = torch.randint(0, count - 1, (vectors, n), generator=g).int()  # the last entry is not used
    scales = torch.rand(2, n, generator=g, dtype=F64) + 0.5
    block = Block(entries, indices, scales, [0] * (vectors // 2) + [1] * (vectors - vectors // 2))
    return block, form, torch.randn(width, n, generator=g, dtype=F64)


def loss(x, block: Block, form: Form) -> torch.Tensor:
    """Of each row."""
    difference = x - block.decode()
    return (difference * (form.metric @ difference)).sum(0)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_decode_gather_and_add(dim):
    block, _, _ = block_problem(dim)
    decoded = block.decode()
    for vector in range(6):
        for row in range(6):
            expected = block.scales[block.group[vector], row] * block.entries[row // 3, block.indices[vector, row].item()]
            assert torch.equal(decoded[vector * dim : (vector + 1) * dim, row], expected)
    values = torch.randn(6, dim, 6, dtype=F64)
    flat = block.flat()
    towards = torch.randn_like(block.entries)
    left, right = (block.gather(towards, flat) * values).sum(), (towards * block.add(values, block.clusters(flat))).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)  # one is the other's transpose


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_codebooks_are_those_of_the_dense_system(dim):
    block, form, x = block_problem(dim)
    gradient = form.metric @ (x - block.decode())
    found = solve_codebooks(block, form, gradient, 60)
    lower = torch.linalg.cholesky(form.metric)
    for group in range(2):
        rows = range(group * 3, group * 3 + 3)
        design, right = [], []
        for row in rows:
            spread = torch.zeros(6 * dim, 5 * dim, dtype=F64)
            for vector in range(6):
                for j in range(dim):
                    spread[vector * dim + j, block.indices[vector, row] * dim + j] = block.scales[block.group[vector], row]
            design.append(lower.T @ spread)
            right.append(lower.T @ x[:, row])
        dense = torch.linalg.lstsq(torch.cat(design), torch.cat(right)[:, None], driver="gelsd").solution.view(5, dim)
        used = block.indices[:, list(rows)].long().unique()
        torch.testing.assert_close(found[group, used], dense[used], rtol=1e-6, atol=1e-6)
    unused = 4
    assert torch.equal(found[:, unused], block.entries[:, unused])


def test_no_step_of_the_codebooks_solution_increases_the_loss():
    block, form, x = block_problem(2, groups=3, rows=8, vectors=20, count=9)
    gradient = form.metric @ (x - block.decode())
    losses = [loss(x, block, form).view(3, 8).sum(1)]
    for steps in (1, 2, 3, 5, 8, 16, 40):
        losses.append(loss(x, replace(block, entries=solve_codebooks(block, form, gradient, steps)), form).view(3, 8).sum(1))
    assert all((b <= a * (1 + 1e-12)).all() for a, b in zip(losses, losses[1:], strict=False))


def test_scales_are_those_of_the_dense_system():
    block, form, x = block_problem(2)
    found = solve_scales(block, form, block.decode(), form.metric @ (x - block.decode()))
    lower = torch.linalg.cholesky(form.metric)
    unit = replace(block, scales=torch.ones_like(block.scales)).decode()
    for row in range(6):
        design = torch.zeros(12, 2, dtype=F64)
        design[:6, 0], design[6:, 1] = unit[:6, row], unit[6:, row]
        dense = torch.linalg.lstsq(lower.T @ design, (lower.T @ x[:, row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[:, row], dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_reassignment_is_coordinate_descent(dim, monkeypatch):
    """Each index is the best of all while the others stay, in turn, whatever the pieces; no row gets worse."""
    block, form, x = block_problem(dim, vectors=12)
    expected = replace(block, indices=block.indices.clone())
    for vector in range(12):
        tried = []
        for entry in range(5):
            other = expected.indices.clone()
            other[vector] = entry
            tried.append(loss(x, replace(expected, indices=other), form))
        expected.indices[vector] = torch.stack(tried).argmin(0).int()
    before = block.decode()
    base = before + form.newton(form.metric @ (x - before))
    for piece in (4, 32):
        monkeypatch.setattr("qcompiler.numerics.vq_block.PIECE", piece)
        trial = replace(block)
        made = visit(base.clone(), form.coupling, form.choice, trial, Nearest(5, x), before)
        assert torch.equal(trial.indices, expected.indices) and torch.equal(made, trial.decode())
        assert (loss(x, trial, form) <= loss(x, block, form) * (1 + 1e-12)).all()


def test_groups_of_rows_are_visited_alike_in_pieces(monkeypatch):
    block, form, x = block_problem(2, groups=5)
    base = block.decode() + form.newton(form.metric @ (x - block.decode()))
    whole, pieces = replace(block), replace(block, indices=block.indices.clone())
    visit(base.clone(), form.coupling, form.choice, whole, Nearest(5, x), block.decode())
    monkeypatch.setattr("qcompiler.numerics.vq_block.ELEMENTS", 40)
    visit(base.clone(), form.coupling, form.choice, pieces, Nearest(5, x), block.decode())
    assert torch.equal(whole.indices, pieces.indices)


@pytest.mark.parametrize("kind", SHAPES)
def test_rounds_and_passes_never_increase_the_loss_of_a_codebook(kind):
    """Under the damped Hessian, and each group of rows on its own."""
    some = Problem(SHAPES[kind], rounds=1, passes=1)
    solved = some.solve()
    product = lambda here, difference: some.damped[here] @ difference  # noqa: E731
    rows = some.rows.rows
    last = some.losses(solved.difference).view(-1, rows).sum(1)
    plain = some.losses(Problem(SHAPES[kind]).solve().difference).sum()
    assert last.sum() < plain
    for _ in range(4):
        some.rows.improve(solved, product, lambda here: some.damped[here, here])
        found = some.losses(solved.difference).view(-1, rows).sum(1)
        assert (found <= last * (1 + 1e-12)).all()
        last = found
        decoded = torch.cat([coded.block.decode() for coded in solved.blocks])
        torch.testing.assert_close(some.columns - decoded, solved.difference, rtol=0, atol=1e-14)
        for coded in solved.blocks:  # what is solved for is what is stored
            assert torch.equal(coded.codes * coded.steps[:, None, None], coded.block.entries)
            assert torch.equal(some.rows.codec.scales(coded.block.scales), coded.block.scales)
