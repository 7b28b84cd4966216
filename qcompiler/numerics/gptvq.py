"""GPTVQ: vector-quantized weights that keep the layer's output, tr(D H Dᵀ) with D = W − W̃.

After "GPTVQ: the blessing of dimensionality for LLM quantization" (arXiv 2402.15319).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qcompiler.numerics import affine, gptaq, gptvq_official
from qcompiler.numerics import hessian as moments
from qcompiler.numerics.damping import LARGEST, Factor, NotFactored, factorise
from qcompiler.numerics.sweep import damped_losses
from qcompiler.numerics.vq import VqWeight
from qcompiler.numerics.vq_codec import Codec
from qcompiler.numerics.vq_shape import VqGeneral, VqShape, VqSolution
from qcompiler.numerics.vq_sweep import Plan, Rows, Solved, Tuning, plan
from qcompiler.ops.formats import VqFormat

# Rows that are solved at once: some six float32 matrices of [k, rows] should be small beside the Hessian.
ROWS, ELEMENTS, LEAST_ROWS = 4096, 2**24, 512
ROWS_ELSEWHERE = 65536
DAMPED = 256  # columns of a product whose squares are summed


@dataclass(frozen=True)
class GptvqOptions:
    """How to solve.

    Attributes:
        mode: `exact`; `official`: the behaviour of the authors' program, to compare with.
        damping: what is added to diag(H), as a share of its mean; ten times more, at most 1, until a factor exists.
        floor: diagonal entries below this share of the mean are lifted to it.
        iterations: of EM for a codebook, at most.
        tolerance: EM ends when an iteration takes less than this share off the error.
        seeding: of EM: `k-means++`; `mahalanobis`: points at equal ranks of their distance from the mean; `neighbour`: the
            codebook of the block before, if there is one, otherwise as `mahalanobis`.
        rounds: of {codebooks, scales, assignments} in a block of columns when the sweep reaches it.
        passes: over all columns after the sweep, with the same rounds in each block. Where one block is all, one more round
            takes their place.
        steps: of conjugate gradients for a block's codebooks.
        ordering: in which order blocks of columns, and vectors in a block, are visited: `activation`: by their largest
            diag(H); `none`.
        compare: also find the loss of taking, with the codebooks that the sweep begins each block with, the entry nearest
            to each vector of the weight. Should that be lower in the end, `vq_nearest` is tried too.
        dtype: of the sweep.
    """

    mode: Literal["exact", "official"] = "exact"
    damping: float = 0.01
    floor: float = 1e-6
    iterations: int = 100
    tolerance: float = 1e-3
    seeding: Literal["mahalanobis", "k-means++", "neighbour"] = "k-means++"
    rounds: int = 2
    passes: int = 1
    steps: int = 3
    ordering: Literal["none", "activation"] = "activation"
    compare: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        allowed = {
            "mode": ("exact", "official"), "seeding": ("mahalanobis", "k-means++", "neighbour"),
            "ordering": ("none", "activation"), "dtype": (torch.float32, torch.float64),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                expected = ", ".join(map(repr, values))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name, least in (("iterations", 1), ("rounds", 0), ("passes", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.damping <= LARGEST or not 0 <= self.floor <= 1:
            raise ValueError(f"damping is {self.damping:g} and floor {self.floor:g}, expected shares of the mean, 0 to 1")


NEAREST = GptvqOptions(iterations=30, compare=False)


@dataclass(frozen=True)
class GptvqResult:
    """A solved layer.

    Attributes:
        weight: as it is stored.
        loss_before: tr(D H Dᵀ) of the entries nearest to the weight's vectors (see `GptvqOptions.compare`); None where it
            was not compared. With cross statistics the part of mean ‖W̃ x − W x̃‖² that depends on W̃, which may be negative.
        loss_after: the same of `weight.dequantize()`.
        damping: what was used, as a share of the mean of diag(H); the largest of several Hessians.
        attempts: factorisations that it took, of all Hessians.
        dead: columns that no calibration input excites.
        fallback: why `weight` is that of `vq_nearest` after all, or None. A caller reports it.
    """

    weight: VqSolution
    loss_before: float | None
    loss_after: float
    damping: float
    attempts: int
    dead: int
    fallback: str | None = None


@torch.no_grad()
def gptvq(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: VqFormat | VqShape,
    options: GptvqOptions = GptvqOptions(),
    *,
    cross: torch.Tensor | None = None,
    row_hessians: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    seed: int = 0,
) -> GptvqResult:
    """Quantize one weight.

    Args:
        weight: float `[n, k]`, finite.
        hessian: mean x xᵀ of the layer's inputs, float32 or float64 `[k, k]`, symmetric, on the device of `weight`. May be
            None where `row_hessians` are given.
        format: of the result.
        cross: mean (x̃ − x) xᵀ `[k, k]`, x̃ the input of the float model: the loss is then that of W̃ x against W x̃.
        row_hessians: `[parts, k, k]`: part i of the rows, which are cut into equal parts of whole codebooks, has its own.
        table: float `[centroids, dim]`: fixed entries of all codebooks; only scales and indices are solved for.
        seed: of k-means++ and of nothing else.

    Raises:
        ValueError: NaN or infinite entries, shapes that do not fit, more centroids than a block has vectors, or a range
            that float16 scales cannot hold.
    """
    n, k = weight.shape
    shape = format if isinstance(format, VqShape) else VqShape.of(format)
    if hessian is None and row_hessians is None:
        raise ValueError("the solver needs a Hessian, for all rows or for parts of them; `vq_nearest` needs none")
    _check(weight, hessian, shape, cross, row_hessians, table)
    if options.mode == "official" and (cross is not None or table is not None):
        raise ValueError("mode 'official' knows neither cross statistics nor fixed tables: use mode 'exact'")
    codec = Codec.of(shape, weight, table)
    parts = [hessian] if row_hessians is None else list(row_hessians)
    solver = _Solver(shape, codec, options, seed)
    size = n // len(parts)
    found = []
    for part, own in enumerate(parts):
        assert own is not None
        found.append(solver.solve(weight[part * size : (part + 1) * size], own, cross))
    solved = solver.solution([piece for part in found for piece in part.pieces], n, k)
    dead = max(int((own.diagonal() == 0).sum()) for own in parts if own is not None)
    damping, attempts = max(part.damping for part in found), sum(part.attempts for part in found)
    after = sum(part.after for part in found)
    befores = [part.before for part in found if part.before is not None]
    before = sum(befores) if len(befores) == len(found) else None
    result = GptvqResult(solved, before, after, damping, attempts, dead)
    reasons = [part.reason for part in found if part.reason]
    if reasons or before is None or after <= before:
        return replace(result, fallback=reasons[0] if reasons else None)
    rounded = vq_nearest(weight, format, table, seed=seed)
    lost = 0.0
    for part, own in enumerate(parts):
        rows = slice(part * size, (part + 1) * size)
        lost += _loss(weight[rows], rounded.dequantize(rows), own, cross)
    if after <= lost:
        return result
    reason = f"the layer loss after the sweep, {after:.4g}, is above that of the weight's own codebooks, {lost:.4g}"
    return replace(result, weight=rounded, loss_after=lost, fallback=reason)


@torch.no_grad()
def vq_nearest(
    weight: torch.Tensor, format: VqFormat | VqShape, table: torch.Tensor | None = None, *, seed: int = 0
) -> VqSolution:
    """Codebooks and scales of the weight alone: Σ (W − W̃)² is made small.

    Args:
        weight: float `[n, k]`, finite.
        format, table, seed: as in `gptvq`.

    Raises:
        ValueError: as `gptvq`.
    """
    n, k = weight.shape
    shape = format if isinstance(format, VqShape) else VqShape.of(format)
    _check(weight, None, shape, None, None, table)
    solver = _Solver(shape, Codec.of(shape, weight, table), NEAREST, seed)
    return solver.solution(solver.nearest(weight), n, k)


def _check(weight, hessian, shape: VqShape, cross, row_hessians, table) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries")
    n, k = weight.shape
    if table is not None and table.shape != (shape.centroids, shape.dim):
        raise ValueError(f"the table is {list(table.shape)}, expected [{shape.centroids}, {shape.dim}]: one row for each entry")
    rows, columns = min(shape.rows or n, n), min(shape.columns or k, k)
    vectors = rows * shape.vectors(columns)
    if table is None and shape.centroids > vectors:
        raise ValueError(
            f"{shape.centroids} centroids for a block of {rows} x {columns} weights, which are {vectors} vectors of "
            f"{shape.dim}: a codebook would be larger than what it stands for; use fewer centroids or larger blocks"
        )
    if hessian is not None:
        moments.check(hessian, k)
    if cross is not None:
        moments.check(cross, k, "cross statistic")
    if row_hessians is not None:
        if n % len(row_hessians):
            raise ValueError(f"{n} rows have no {len(row_hessians)} equal parts, one for each Hessian")
        size = n // len(row_hessians)
        if len(row_hessians) > 1 and table is None and (not shape.rows or size % shape.rows):
            raise ValueError(
                f"a codebook's rows, {shape.rows or 'all'}, would cross the {len(row_hessians)} parts of {size} rows that have "
                "a Hessian each; use fewer parts, or smaller blocks"
            )
        for own in row_hessians:
            moments.check(own, k)


def _loss(weight: torch.Tensor, dequantized: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor | None) -> float:
    loss = moments.layer_loss(weight, dequantized, hessian)
    if cross is not None:
        w = weight.to(cross.dtype)
        loss += gptaq.linear_terms(w.T, (w - dequantized).T, cross).sum().item()
    return loss


@dataclass
class _Piece:
    """Solved rows, natural order: indices int32 `[n, vectors]`, codes and steps of `[down, across]`, scales `[n, groups]`."""

    indices: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor


@dataclass
class _Part:
    """The rows that share a Hessian."""

    pieces: list[_Piece]
    damping: float
    attempts: int
    before: float | None
    after: float
    reason: str | None = None


class _Solver:
    def __init__(self, shape: VqShape, codec: Codec, options: GptvqOptions, seed: int) -> None:
        self.shape, self.codec, self.options = shape, codec, options
        self.seed = seed
        self.fixed = codec.table is not None

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor | None) -> _Part:
        options, k = self.options, weight.shape[1]
        padding = self.shape.vectors(k) * self.shape.dim - k
        diagonal = hessian.diagonal()
        official = options.mode == "official"
        layout = plan(diagonal, self.shape, "none" if official else options.ordering, self.fixed)
        dead = torch.nn.functional.pad(diagonal == 0, (0, padding))
        if padding:
            mean = diagonal.mean().expand(padding)
            hessian = torch.block_diag(hessian, torch.diag(torch.where(mean > 0, mean, 1.0)))
        permutation = layout.permutation
        damped_of = hessian
        if official and dead.any():
            damped_of = hessian.clone()
            damped_of[dead, dead] = 1
        factor = factorise(damped_of, options.damping, options.floor, permutation, options.dtype)
        if isinstance(factor, NotFactored):
            pieces = self.nearest(weight)
            solved = self.solution(pieces, *weight.shape).dequantize()
            loss = _loss(weight, solved, hessian[:k, :k], cross)
            return _Part(pieces, factor.damping, factor.attempts, loss, loss, factor.reason)
        target = None
        given = cross
        if cross is not None:
            cross = torch.nn.functional.pad(cross, (0, padding, 0, padding)).to(options.dtype)
            cross = cross.index_select(0, permutation).index_select(1, permutation)
            target = lambda columns: gptaq.target(columns, cross, factor.upper)  # noqa: E731
        damped = _Damped(hessian, factor.added.to(options.dtype), permutation)
        undamped = _Damped(hessian, torch.zeros_like(damped.added), permutation)
        pieces = []
        before = after = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows in self._pieces(weight):
            solver = self._rows(rows, layout, target)
            if official:
                solved = gptvq_official.sweep(solver, factor.upper, dead[permutation], undamped.product)
            else:
                solved = solver.sweep(factor.upper)
                for _ in range(0 if solver.single else options.passes):
                    solver.improve(solved, damped.product, damped.metric)
                if self.shape.codebooks == "svd":
                    solver.compress(solved)
                    solver.improve(solved, damped.product, damped.metric, frozen=True)
            pieces.append(self._natural(solved, layout, len(rows)))
            if given is None:
                after = after + self._damped_loss(solved.difference, factor)
                before = before if solved.rounded is None else before + self._damped_loss(solved.rounded, factor)
            else:
                after = after + self._cross_loss(rows, solved.difference, solver.columns, layout, hessian, given)
                if solved.rounded is not None:
                    before = before + self._cross_loss(rows, solved.rounded, solver.columns, layout, hessian, given)
        compared = options.compare and not official
        return _Part(pieces, factor.damping, factor.attempts, before.item() if compared else None, after.item())

    def _damped_loss(self, difference: torch.Tensor, factor: Factor) -> torch.Tensor:
        """tr(D H Dᵀ): that of the damped Hessian, without the part of δ."""
        loss = damped_losses(difference, factor.upper, DAMPED).sum()
        loss -= (factor.added.to(difference.dtype) @ difference.square()).sum(dtype=torch.float64)
        return loss * self.codec.unit**2

    def _cross_loss(self, rows, difference, columns, layout: Plan, hessian, cross) -> torch.Tensor:
        k = rows.shape[1]
        made = torch.empty_like(difference)
        made[layout.permutation] = (columns - difference).mul_(self.codec.unit)
        solved = made[:k, : len(rows)].T
        return torch.tensor(_loss(rows, solved, hessian[:k, :k], cross), dtype=torch.float64, device=rows.device)

    def nearest(self, weight: torch.Tensor) -> list[_Piece]:
        layout = plan(weight.new_ones(weight.shape[1]), self.shape, "none", self.fixed)
        return [self._natural(self._rows(rows, layout).sweep(None), layout, len(rows)) for rows in self._pieces(weight)]

    def _pieces(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows in pieces of whole codebooks."""
        n, k = weight.shape
        if not (self.shape.rows or self.fixed) or self.shape.scales == "log4" or self.shape.codebooks == "svd":
            return (weight,)
        size = max(LEAST_ROWS, min(ROWS, ELEMENTS // k)) if weight.device.type == "cpu" else ROWS_ELSEWHERE
        step = self.shape.rows or 1
        return weight.split(-(-size // step) * step)

    def _rows(self, weight: torch.Tensor, layout: Plan, target: Callable | None = None) -> Rows:
        n, k = weight.shape
        rows = n if self.fixed or not self.shape.rows else min(self.shape.rows, n)
        columns = weight.new_zeros(len(layout.permutation), -(-n // rows) * rows, dtype=self.options.dtype)
        real = layout.permutation < k
        columns[:, :n] = weight.to(self.options.dtype).T[layout.permutation.clamp(max=k - 1)] * real[:, None]
        columns /= self.codec.unit
        if target is not None:
            columns = target(columns)
        generator = torch.Generator().manual_seed(self.seed)
        options = self.options
        tuning = Tuning(
            options.iterations, options.tolerance, options.seeding, options.rounds, options.passes, options.steps,
            options.compare and options.mode == "exact",
        )  # fmt: skip
        return Rows(columns, n, rows, layout, self.codec, tuning, generator)

    def _natural(self, solved: Solved, layout: Plan, count: int) -> _Piece:
        blocks = solved.blocks
        placed = torch.cat([b.block.indices for b in blocks])[:, :count].T
        indices = torch.empty_like(placed, memory_format=torch.contiguous_format)
        indices[:, layout.vectors] = placed
        across = 1 + max(span.across for span in layout.spans)
        codes = blocks[0].codes.new_zeros(len(blocks[0].codes), across, *blocks[0].codes.shape[1:])
        steps = blocks[0].steps.new_zeros(len(blocks[0].steps), across)
        groups = 1 + max(max(span.groups) for span in layout.spans)
        scales = blocks[0].block.scales.new_zeros(count, groups)
        for span, coded in zip(layout.spans, blocks, strict=True):
            codes[:, span.across], steps[:, span.across] = coded.codes, coded.steps
            scales[:, span.groups] = coded.block.scales.T[:count]
        return _Piece(indices, codes, steps, scales)

    def solution(self, pieces: list[_Piece], n: int, k: int) -> VqSolution:
        shape, codec = self.shape, self.codec
        indices = torch.cat([piece.indices for piece in pieces])
        codes, steps = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.steps for piece in pieces])
        if self.fixed:  # pieces of rows had one each
            down, across = shape.blocks(n, k)
            codes, steps = (t[:1, :1].expand(down, across, *t.shape[2:]).contiguous() for t in (codes, steps))
        scales = torch.cat([piece.scales for piece in pieces]) * codec.scale_unit
        steps = steps * codec.codebook_unit
        for name, values in (("scale", scales), ("codebook's scale", steps)):
            if self.shape.scales == "fp16" and not (values.abs() < affine.LARGEST_SCALE).all():
                raise ValueError(f"a {name} exceeds what float16 holds, {affine.LARGEST_SCALE:g}: the weights' range is too wide")
        try:
            packed = shape.packed()
        except ValueError:
            values = (codes * steps[..., None, None]).float()
            return VqGeneral(indices, values, scales.float(), k, shape)
        return VqWeight(indices.to(torch.uint8), codes.to(torch.int8), steps.half(), scales.half(), k, packed)


@dataclass(frozen=True)
class _Damped:
    """H + δ in the order of the sweep, a block of rows at a time: nothing of its size is held beside it."""

    hessian: torch.Tensor
    added: torch.Tensor
    permutation: torch.Tensor

    def product(self, here: slice, difference: torch.Tensor) -> torch.Tensor:
        rows = self.hessian.index_select(0, self.permutation[here]).index_select(1, self.permutation)
        made = rows.to(difference.dtype) @ difference
        return made.addcmul_(self.added[here, None], difference[here])

    def metric(self, here: slice) -> torch.Tensor:
        own = self.permutation[here]
        made = self.hessian.index_select(0, own).index_select(1, own).to(self.added.dtype)
        made.diagonal().add_(self.added[here])
        return made
