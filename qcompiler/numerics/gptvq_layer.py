"""GPTVQ of the rows that share a Hessian: the order, the factor, the sweep and its passes, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.numerics import affine, gptaq, gptvq_official
from qcompiler.numerics import hessian as moments
from qcompiler.numerics.damping import LARGEST, Factor, NotFactored, factorise
from qcompiler.numerics.sweep import damped_losses
from qcompiler.numerics.vq import VqWeight
from qcompiler.numerics.vq_codec import Codec
from qcompiler.numerics.vq_plan import Plan, plan
from qcompiler.numerics.vq_shape import VqGeneral, VqShape, VqSolution
from qcompiler.numerics.vq_sweep import Rows, Solved, Tuning

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
        seeding: of EM: `k-means++`, or `mahalanobis`: points at equal ranks of their distance from the mean.
        rounds: of {codebooks, scales, assignments} in a block of columns when the sweep reaches it.
        passes: over all columns after the sweep, with the same rounds in each block; with none, coordinate descent on the
            indices alone. Where one block is all, one more round takes their place.
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
    seeding: Literal["mahalanobis", "k-means++"] = "k-means++"
    rounds: int = 2
    passes: int = 1
    steps: int = 3
    ordering: Literal["none", "activation"] = "activation"
    compare: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        allowed = {
            "mode": ("exact", "official"), "seeding": ("mahalanobis", "k-means++"), "ordering": ("none", "activation"),
            "dtype": (torch.float32, torch.float64),
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


def loss_of(weight: torch.Tensor, dequantized: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor | None) -> float:
    loss = moments.layer_loss(weight, dequantized, hessian)
    if cross is not None:
        w = weight.to(cross.dtype)
        loss += gptaq.linear_terms(w.T, (w - dequantized).T, cross).sum().item()
    return loss


@dataclass
class Piece:
    """Solved rows, natural order: indices int32 `[n, vectors]`, codes and steps of `[down, across]`, scales `[n, groups]`."""

    indices: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor


@dataclass
class Part:
    """The rows that share a Hessian."""

    pieces: list[Piece]
    damping: float
    attempts: int
    before: float | None
    after: float
    reason: str | None = None


class Layer:
    """Solves weights of one shape."""

    def __init__(self, shape: VqShape, codec: Codec, options: GptvqOptions, seed: int) -> None:
        self.shape, self.codec, self.options = shape, codec, options
        self.seed = seed
        self.fixed = codec.table is not None

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor | None) -> Part:
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
            dequantized = self.solution(pieces, *weight.shape).dequantize()
            loss = loss_of(weight, dequantized, hessian[:k, :k], cross)
            return Part(pieces, factor.damping, factor.attempts, loss, loss, factor.reason)
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
            solved: Solved
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
        return Part(pieces, factor.damping, factor.attempts, before.item() if compared else None, after.item())

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
        return torch.tensor(loss_of(rows, solved, hessian[:k, :k], cross), dtype=torch.float64, device=rows.device)

    def nearest(self, weight: torch.Tensor) -> list[Piece]:
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

    def _natural(self, solved: Solved, layout: Plan, count: int) -> Piece:
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
        return Piece(indices, codes, steps, scales)

    def solution(self, pieces: list[Piece], n: int, k: int) -> VqSolution:
        shape, codec = self.shape, self.codec
        indices = torch.cat([piece.indices for piece in pieces])
        codes, steps = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.steps for piece in pieces])
        if self.fixed:  # pieces of rows had one each
            down, across = shape.blocks(n, k)
            codes, steps = (t[:1, :1].expand(down, across, *t.shape[2:]).contiguous() for t in (codes, steps))
        scales = torch.cat([piece.scales for piece in pieces]) * codec.scale_unit
        steps = steps * codec.codebook_unit
        for name, values in (("scale", scales), ("codebook's scale", steps)):
            if not (values.abs() < affine.LARGEST_SCALE).all():
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
