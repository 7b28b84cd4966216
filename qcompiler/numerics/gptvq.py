"""GPTVQ: vector-quantized weights that keep the layer's output, tr(D H Dᵀ) with D = W − W̃.

After "GPTVQ: the blessing of dimensionality for LLM quantization" (arXiv 2402.15319). Beyond it:

- Feedback is exact: the columns of a vector are chosen jointly under the metric of what the columns after them cannot take
  over, and hand all of their error on, so D = E U and ‖E‖² = tr(D (H + δ) Dᵀ) hold as for single columns.
- Scales are fitted on what the sweep finds in a block, and solved for, with codebooks and indices in turn, before it goes on:
  each exactly given the rest, with the 8-bit and float16 values that are stored, and never to a greater loss.
- Passes over all columns do the same under the whole Hessian once the sweep is over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, overload

import torch

from qcompiler.numerics import hessian as moments
from qcompiler.numerics.gptvq_layer import GptvqOptions, Layer, loss_of
from qcompiler.numerics.vq import VqWeight
from qcompiler.numerics.vq_codec import Codec
from qcompiler.numerics.vq_shape import VqShape, VqSolution
from qcompiler.ops.formats import VqFormat

Solution = TypeVar("Solution", bound=VqSolution)
DEFAULTS = GptvqOptions()
NEAREST = GptvqOptions(iterations=30, compare=False)  # of `vq_nearest`


@dataclass(frozen=True)
class GptvqResult(Generic[Solution]):
    """A solved layer.

    Attributes:
        weight: as it is stored: a `VqWeight` where the shape has a packed form, else a `VqGeneral`.
        loss_before: tr(D H Dᵀ) of the entries nearest to the weight's vectors (see `GptvqOptions.compare`); None where it
            was not compared. With cross statistics the part of mean ‖W̃ x − W x̃‖² that depends on W̃, which may be negative.
        loss_after: the same of `weight.dequantize()`.
        damping: what was used, as a share of the mean of diag(H); the largest of several Hessians.
        attempts: factorisations that it took, of all Hessians.
        dead: columns that no calibration input excites.
        fallback: why `weight` is that of `vq_nearest` after all, or None. A caller reports it.
    """

    weight: Solution
    loss_before: float | None
    loss_after: float
    damping: float
    attempts: int
    dead: int
    fallback: str | None = None


@overload
def gptvq(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: VqFormat,
    options: GptvqOptions = ...,
    *,
    cross: torch.Tensor | None = ...,
    row_hessians: torch.Tensor | None = ...,
    table: torch.Tensor | None = ...,
    seed: int = ...,
) -> GptvqResult[VqWeight]: ...
@overload
def gptvq(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: VqShape,
    options: GptvqOptions = ...,
    *,
    cross: torch.Tensor | None = ...,
    row_hessians: torch.Tensor | None = ...,
    table: torch.Tensor | None = ...,
    seed: int = ...,
) -> GptvqResult[VqSolution]: ...
@torch.no_grad()
def gptvq(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: VqFormat | VqShape,
    options: GptvqOptions = DEFAULTS,
    *,
    cross: torch.Tensor | None = None,
    row_hessians: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    seed: int = 0,
) -> GptvqResult[Any]:
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
    parts = [own for own in (row_hessians if row_hessians is not None else [hessian]) if own is not None]
    solver = Layer(shape, codec, options, seed)
    size = n // len(parts)
    found = []
    for part, own in enumerate(parts):
        found.append(solver.solve(weight[part * size : (part + 1) * size], own, cross))
    solved = solver.solution([piece for part in found for piece in part.pieces], n, k)
    dead = max(int((own.diagonal() == 0).sum()) for own in parts)
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
        lost += loss_of(weight[rows], rounded.dequantize(rows), own, cross)
    if after <= lost:
        return result
    reason = f"the layer loss after the sweep, {after:.4g}, is above that of the weight's own codebooks, {lost:.4g}"
    return replace(result, weight=rounded, loss_after=lost, fallback=reason)


@overload
def vq_nearest(
    weight: torch.Tensor, format: VqFormat, table: torch.Tensor | None = ..., *, seed: int = ...,
    iterations: int = ...,
) -> VqWeight: ...
@overload
def vq_nearest(
    weight: torch.Tensor, format: VqShape, table: torch.Tensor | None = ..., *, seed: int = ...,
    iterations: int = ...,
) -> VqSolution: ...
@torch.no_grad()
def vq_nearest(
    weight: torch.Tensor, format: VqFormat | VqShape, table: torch.Tensor | None = None, *, seed: int = 0,
    iterations: int = NEAREST.iterations,
) -> Any:
    """Codebooks and scales of the weight alone: Σ (W − W̃)² is made small.

    Args:
        weight: float `[n, k]`, finite.
        format, table, seed: as in `gptvq`.
        iterations: of EM at most.

    Raises:
        ValueError: as `gptvq`.
    """
    n, k = weight.shape
    shape = format if isinstance(format, VqShape) else VqShape.of(format)
    _check(weight, None, shape, None, None, table)
    solver = Layer(shape, Codec.of(shape, weight, table), replace(NEAREST, iterations=iterations), seed)
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
