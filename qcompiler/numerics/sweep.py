"""The sweep of GPTQ: columns are rounded one after another, and those still to come take over the error that is there.

With H + diag(δ) = R Rᵀ, R upper, and U = R⁻¹, the textbook step for column j is

    e_j = (w_j − w̃_j) / U_jj,    W[:, l] −= e_j U[j, l]  for l > j.

All errors together give D = W − W̃ = E U, so E = D R, and what the columns before a block B have fed into it is
D[:, <B] R[<B, B] R[B, B]⁻¹: the sweep reads R and never needs U but for the small blocks on its diagonal. A block is
brought up to date by one matrix product when its turn comes; nothing behind it is touched before. Each value is the one
that the textbook step gives, up to rounding.

Weights are transposed here, `[k, n]`: a column lies in one piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcompiler.numerics.affine import rounding_range
from qcompiler.numerics.ordering import Block, Order
from qcompiler.ops.formats import AffineFormat

Fit = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


class Grids:
    """S and Z of every group and row, `[groups, n]` in the sweep's type.

    Attributes:
        scales, zeros: S and Z.
        rows: of each group S, the least and the largest q − Z, `[n]` each.
    """

    def __init__(self, scales: torch.Tensor, zeros: torch.Tensor, format: AffineFormat, fit: Fit | None = None) -> None:
        """Args:
        scales, zeros: what is known; with `fit` space to fill.
        fit: `(live [n, width], first, last)` -> `(S, Z)` `[n]`: fits a group when the sweep reaches it. The columns, at
            positions `first` to `last`, are what all errors so far have made of them.
        """
        self.scales, self.zeros, self.fit = scales, zeros, fit
        self._range = rounding_range(format)
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = [(scales, scales, scales)] * len(scales)
        if fit is None:
            for group in range(len(scales)):
                self._ready(group)

    def reach(self, group: int, live: torch.Tensor, first: int, last: int) -> None:
        """Fit `group`, whose columns `live` holds `[n, width]`."""
        if self.fit is not None:
            self.scales[group], self.zeros[group] = self.fit(live, first, last)
            self._ready(group)

    def _ready(self, group: int) -> None:
        zero = self.zeros[group]
        self.rows[group] = (self.scales[group], self._range[0] - zero, self._range[1] - zero)


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves, all in its order.

    Attributes:
        codes: `[k, n]`, int8 for 8 bits, uint8 below.
        difference: D `[k, n]`: target − W̃; the target is W, with `mixing` W + V P.
        seen: V `[k, n]`: each column as it was when it was rounded. E = (V − W̃) / U_jj.
        losses: diag(D (H + δ) Dᵀ) = Σ_j E_j², float64 `[n]`.
    """

    codes: torch.Tensor
    difference: torch.Tensor
    seen: torch.Tensor
    losses: torch.Tensor


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    order: Order,
    format: AffineFormat,
    grids: Grids,
    mixing: torch.Tensor | None = None,
    inverses: list[torch.Tensor] | None = None,
) -> Swept:
    """Round all columns.

    Args:
        weight: float `[k, n]`, transposed and in the order of the sweep. Not changed.
        upper: R `[k, k]` of the type of `weight`.
        order: the plan.
        format: of the codes.
        grids: filled where they are fitted on the way.
        mixing: P of GPTAQ `[k, k]`: W[:, l] += v_j P[j, l] with v_j the column j at the moment when it is rounded.
        inverses: of `block_inverses`, where there are several sweeps.
    """
    k, n = weight.shape
    codes = torch.empty(k, n, dtype=torch.int8 if format.bits == 8 else torch.uint8, device=weight.device)
    losses = torch.zeros(n, dtype=torch.float64, device=weight.device)
    difference, seen = torch.empty_like(weight), torch.empty_like(weight)
    widest = max(block.stop - block.start for block in order.blocks)
    buffers = _Buffers(weight.new_empty(widest, n), weight.new_empty(widest, n))
    inverses = block_inverses(upper, order) if inverses is None else inverses
    groups = torch.tensor(order.group, device=weight.device)
    for block, inverse in zip(order.blocks, inverses, strict=True):
        here, before = slice(block.start, block.stop), slice(0, block.start)
        target, stiffness = weight[here], upper.diagonal()[here, None]  # 1 / U_jj
        if mixing is not None:
            target = torch.addmm(target, mixing[before, here].T, seen[before])
        feedback = inverse * stiffness
        live = torch.addmm(target, inverse.T, upper[before, here].T @ difference[before], out=seen[here])
        steps, misses = _round(block, order, grids, feedback, None if mixing is None else mixing[here, here], live, buffers)
        if mixing is not None:
            target.addmm_(mixing[here, here].T, live)
        torch.sub(target, grids.scales.index_select(0, groups[here]).mul_(steps), out=difference[here])
        codes[here] = steps.add_(format.center if format.symmetric else grids.zeros.index_select(0, groups[here]))
        losses += misses.mul_(stiffness).square_().sum(0)
    return Swept(codes, difference, seen, losses)


def block_inverses(upper: torch.Tensor, order: Order) -> list[torch.Tensor]:
    """U of each block, R[B, B]⁻¹."""
    blocks = [upper[b.start : b.stop, b.start : b.stop] for b in order.blocks]
    eyes = [torch.eye(len(own), dtype=own.dtype, device=own.device) for own in blocks]
    return [torch.linalg.solve_triangular(own, eye, upper=True) for own, eye in zip(blocks, eyes, strict=True)]


class _Buffers:
    """Space of a block, `[columns, n]` each, and its columns one by one."""

    def __init__(self, steps: torch.Tensor, misses: torch.Tensor) -> None:
        self.steps, self.misses = steps, misses
        self.step, self.miss = steps.unbind(), misses.unbind()


def _round(
    block: Block,
    order: Order,
    grids: Grids,
    feedback: torch.Tensor,
    mixing: torch.Tensor | None,
    live: torch.Tensor,
    buffers: _Buffers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook step inside a block.

    Args:
        feedback: U[j, l] / U_jj `[columns, columns]`.
        mixing: the block of P, or None.
        live: `[columns, n]`, as the errors of all blocks before have left the columns; ends as V.

    Returns:
        q − Z, and V − W̃, `[columns, n]` each.
    """
    steps, misses = buffers.steps[: len(live)], buffers.misses[: len(live)].zero_()
    # Views of all columns are made at once: to index one costs as much as the arithmetic on it.
    columns = list(zip(live.unbind(), buffers.step, buffers.miss, strict=False))
    groups = order.group[block.start : block.stop]
    taken = feedback.T.contiguous()
    for first, last in ((a - block.start, b - block.start) for a, b in block.pieces):
        position = first + block.start
        if position in order.begins:
            end = order.begins[position]
            grids.reach(groups[first], live[first : end - block.start].T, position, end)
        # Columns of the piece that have not been rounded have missed nothing so far: 0. The product need not be cut.
        missed, shares = misses[first:last].T, taken[first:last, first:last].unbind()
        turns = zip(columns[first:last], shares, groups[first:last], strict=True)
        for j, ((column, step, miss), share, group) in enumerate(turns, first):
            if j > first:
                column.addmv_(missed, share, alpha=-1)
                if mixing is not None:
                    column.addmv_(live[first:j].T, mixing[first:j, j])
            scale, low, high = grids.rows[group]
            torch.div(column, scale, out=step).round_().clamp_(low, high)
            torch.addcmul(column, step, scale, value=-1, out=miss)
        live[last:].addmm_(taken[last:, first:last], misses[first:last], alpha=-1)
        if mixing is not None:
            live[last:].addmm_(mixing[first:last, last:].T, live[first:last])
    return steps, misses


def damped_losses(difference: torch.Tensor, upper: torch.Tensor, block: int) -> torch.Tensor:
    """diag(D (H + δ) Dᵀ) = Σ_j (D R)_j², float64 `[n]`, of `difference` `[k, n]`: half the work of the full product."""
    losses = torch.zeros(difference.shape[1], dtype=torch.float64, device=difference.device)
    for start in range(0, len(difference), block):
        stop = start + block
        product = upper[:stop, start:stop].T @ difference[:stop]
        losses += product.square_().sum(0)
    return losses
