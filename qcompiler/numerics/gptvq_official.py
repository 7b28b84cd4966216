"""GPTVQ as its authors' program does it, to compare with; codebooks come from the same EM as those of the exact solver.

What differs from `vq_sweep`, with U upper and (H + δ)⁻¹ = Uᵀ U:

- An entry is chosen by Σ_j (x_j − c_j)² / U_jj, and each column of a vector feeds (x_j − q_j) / U_jj · U[j, later] forward:
  what one column of a vector takes over of another's error is not there.
- EM weighs columns by U_jj, more where errors cost less. An entry without points becomes 0 and stays. All iterations run.
- With scales, entries are chosen by a copy of 128 columns that was divided by them beforehand: no feedback inside.
- Codebooks are trained once after the sweep: 25 steps of Adam, learning rate 1e-3 and a tenth after each failure. Then they
  are rounded to 8 bits, whatever that does to the loss.
- Columns that no input excites are zeroed. Columns are visited in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from qcompiler.numerics import codebook
from qcompiler.numerics.vq_block import Block, visit
from qcompiler.numerics.vq_plan import Span
from qcompiler.numerics.vq_sweep import Coded, Rows, Solved

COLUMNS = 128  # between two large products
STEPS, RATE, BETAS, EPSILON = 25, 1e-3, (0.9, 0.999), 1e-8
FAILURES = 12


def sweep(
    rows: Rows, upper: torch.Tensor, dead: torch.Tensor, product: Callable[[slice, torch.Tensor], torch.Tensor]
) -> Solved:
    """Solve `rows`.

    Args:
        upper: R of the damped Hessian, R Rᵀ, in the natural order of vectors.
        dead: bool `[k']`: columns that no input excites.
        product: (positions B, D) -> H[B, :] D, without damping.
    """
    factor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True)
    stiffness = factor.diagonal()
    live, dim = rows.columns.clone(), rows.shape.dim
    live[dead] = 0
    blocks: list[Coded] = []
    for span in rows.layout.spans:
        coded = _codebooks(rows, span, live[span.start : span.stop], stiffness[span.start : span.stop])
        parts = []
        for start in range(span.start, span.stop, COLUMNS):
            stop = min(start + COLUMNS, span.stop)
            here, after = slice(start, stop), slice(stop, len(live))
            own = stiffness[here]
            coupling = (factor[here, here] / own[:, None]).T.contiguous()
            _clear(coupling, dim)
            vectors = slice((start - span.start) // dim, (stop - span.start) // dim)
            part = replace(
                coded.block, indices=coded.block.indices[vectors].clone(), group=span.group[vectors],
                real=None if span.real is None else span.real[start - span.start : stop - span.start],
            )  # fmt: skip
            choice = torch.diag_embed((1 / own).view(-1, dim))
            if part.real is not None:
                choice = choice * part.real.view(-1, dim, 1)
            if rows.shape.scales == "none":
                decoded = visit(live[here].clone(), coupling, choice, part, rows.nearest)
            else:
                decoded = visit(live[here].clone(), torch.zeros_like(coupling), choice, part, rows.nearest)
            # V = live − coupling Δ and Δ = V − q
            system = coupling + torch.eye(len(own), dtype=own.dtype, device=own.device)
            missed = torch.linalg.solve_triangular(system, live[here] - decoded, upper=False)
            live[after] -= (factor[here, after] / own[:, None]).T @ missed
            parts.append(part.indices)
        coded.block.indices = torch.cat(parts)
        blocks.append(coded)
    _train(rows, blocks, product)
    difference = torch.cat([
        rows.columns[span.start : span.stop] - coded.block.decode() for span, coded in zip(rows.layout.spans, blocks, strict=True)
    ])  # fmt: skip
    return Solved(blocks, difference)


def _clear(coupling: torch.Tensor, dim: int) -> None:
    """Nothing between the columns of a vector."""
    count = len(coupling) // dim
    coupling.view(count, dim, count, dim).diagonal(dim1=0, dim2=2).zero_()


def _codebooks(rows: Rows, span: Span, live: torch.Tensor, stiffness: torch.Tensor) -> Coded:
    dim = rows.shape.dim
    scales = rows.largest(span, live)
    weights = torch.ones_like(stiffness) if dim == 1 else stiffness
    if span.real is not None:
        weights = weights * span.real[:, 0]
    points, features = rows.features(span, live, torch.diag_embed(weights.view(-1, dim)), scales, scaled=False)
    start = codebook.seed_mahalanobis(points, rows.shape.centroids)
    found = codebook.em(points, features, start, rows.tuning.iterations, -1.0, rows.nearest, reseeded=False)
    codes, steps = rows.codec.codebooks(found[0])
    indices = torch.zeros(len(span.group), live.shape[1], dtype=torch.int32, device=live.device)
    return Coded(Block(codes * steps[:, None, None], indices, scales, span.group, span.real), codes, steps)


def _train(rows: Rows, blocks: list[Coded], product: Callable) -> None:
    """Adam on all entries, then 8 bits."""
    rate = RATE / (rows.codec.unit if rows.shape.scales == "none" else 1.0)
    spans = [slice(span.start, span.stop) for span in rows.layout.spans]
    begin = [coded.block.entries for coded in blocks]
    flats = [coded.block.flat() for coded in blocks]
    clusters = [coded.block.clusters(flat) for coded, flat in zip(blocks, flats, strict=True)]
    spreads = [coded.block.spread()[:, None] for coded in blocks]

    def slopes(entries: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        difference = torch.cat([
            rows.columns[here] - coded.block.gather(own, flat).mul_(spread).flatten(0, 1)
            for here, coded, own, flat, spread in zip(spans, blocks, entries, flats, spreads, strict=True)
        ])  # fmt: skip
        loss, made = 0.0, []
        for here, coded, own, spread in zip(spans, blocks, clusters, spreads, strict=True):
            image = product(here, difference)
            loss += (image * difference[here]).sum(dtype=torch.float64).item()
            made.append(-2 * coded.block.add(image.view(len(coded.block.indices), rows.shape.dim, -1) * spread, own))
        return loss, made

    first, slope = slopes(begin)
    for _ in range(FAILURES):
        trained = _adam(begin, slope, first, rate, slopes)
        if trained is not None:
            break
        rate /= 10
    else:
        trained = begin
    for coded, entries in zip(blocks, trained, strict=True):
        coded.codes, coded.steps = rows.codec.codebooks(entries)
        coded.block = replace(coded.block, entries=coded.codes * coded.steps[:, None, None])


def _adam(begin: list[torch.Tensor], slope: list[torch.Tensor], first: float, rate: float, slopes: Callable):
    """The entries after all steps, or None where a loss was above the first."""
    entries = begin
    means, squares = [torch.zeros_like(e) for e in begin], [torch.zeros_like(e) for e in begin]
    loss = first
    for step in range(1, STEPS + 1):
        if not loss <= first:
            return None
        means = [BETAS[0] * m + (1 - BETAS[0]) * g for m, g in zip(means, slope, strict=True)]
        squares = [BETAS[1] * v + (1 - BETAS[1]) * g * g for v, g in zip(squares, slope, strict=True)]
        scale = rate / (1 - BETAS[0] ** step)
        entries = [
            e - scale * m / ((v / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
            for e, m, v in zip(entries, means, squares, strict=True)
        ]
        if step < STEPS:  # the last step is not checked
            loss, slope = slopes(entries)
    return entries
