"""GPTQ: affine codes that keep the layer's output, tr(D H Dᵀ) with D = W − W̃, rather than the weight itself.

After "GPTQ: accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323). Beyond it:

- Several sweeps. What a column holds when it is rounded is not what it held at first, and grids should fit that. The first
  sweep has min-max grids of the original weight; each later one fits the grids to what its forerunner saw, and clips them
  where the error that the sweep pays for gets less. A row keeps the best of its sweeps: where inputs are strongly
  correlated, clipped columns can push their neighbours out of range in turn, and min-max is better.
- Columns are visited by activation, yet grids are known beforehand, so groups stay where they are.
- Columns that no input excites are rounded and not zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from qcompiler.numerics import affine, gptaq
from qcompiler.numerics import hessian as moments
from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.damping import LARGEST, Factor, NotFactored, factorise
from qcompiler.numerics.ordering import Order, order_columns
from qcompiler.numerics.sweep import Grids, block_inverses, damped_losses, sweep
from qcompiler.ops.formats import AffineFormat

# Rows that are swept at once. On a processor a block of 128 columns of them should stay in its cache, and what a sweep
# holds, some five float32 matrices of [k, rows], should be small beside the Hessian.
ROWS, ELEMENTS = 4096, 2**24
ROWS_ELSEWHERE = 65536


@dataclass(frozen=True)
class GptqOptions:
    """How to solve. The defaults gave the least layer loss of those measured (`tools/bench/gptq`).

    Attributes:
        block: columns that are swept between two large matrix products; a group is not cut by it.
        damping: what is added to diag(H), as a share of its mean; ten times more, at most 1, until a factor exists.
        floor: diagonal entries below this share of the mean are lifted to it.
        passes: sweeps. `groups`, `clipping` and `importance` say what grids the first has; each later one fits the grid of
            every group, clipping `mse`, to what its columns held when the sweep before rounded them. A third takes a few
            per cent more off the loss of 2 and 3 bits.
        groups: `static` grids are fitted on the original weight; `live` ones when the sweep reaches the group, on what its
            columns hold then.
        ordering: `none`; `group_aware`: groups by their largest diag(H), columns by diag(H) inside each; `activation`: all
            columns by diag(H), which needs static grids.
        clipping: of the grids: `mse`, a search over clipped ranges, or `minmax`.
        importance: what an error counts in that search: `uniform`; `activation`: diag(H); `sweep`: 1 / U_jj², which is what
            the sweep pays for it after all compensation.
        norm: exponent of the search.
        correction: with cross statistics: `channel` (GPTAQ) or `target`.
        compare: also round to nearest, and keep that where it has the lower loss. Its clipping is `mse`; where the first sweep
            starts from such grids, they are its grids too.
        dtype: of the sweep.
    """

    block: int = 128
    damping: float = 0.01
    floor: float = 1e-6
    passes: int = 2
    groups: Literal["live", "static"] = "static"
    ordering: Literal["none", "activation", "group_aware"] = "activation"
    clipping: Literal["mse", "minmax"] = "mse"
    importance: Literal["uniform", "activation", "sweep"] = "sweep"
    norm: float = 2.0
    correction: Literal["channel", "target"] = "channel"
    compare: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        allowed = {
            "groups": ("live", "static"), "ordering": ("none", "activation", "group_aware"), "clipping": ("mse", "minmax"),
            "importance": ("uniform", "activation", "sweep"), "correction": ("channel", "target"),
            "dtype": (torch.float32, torch.float64),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                expected = ", ".join(map(repr, values))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name in ("block", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.damping <= LARGEST or not 0 <= self.floor <= 1:
            raise ValueError(f"damping is {self.damping:g} and floor {self.floor:g}, expected shares of the mean, 0 to 1")


@dataclass(frozen=True)
class GptqResult:
    """A solved layer.

    Attributes:
        weight: codes in their natural order, scales, zeros.
        loss_before: tr(D H Dᵀ) of rounding to nearest, see `GptqOptions.compare`; None where it was not compared. With cross
            statistics the part of mean ‖W̃ x − W x̃‖² that depends on W̃, which may be negative.
        loss_after: the same of `weight`.
        damping: what was used, as a share of the mean of diag(H).
        attempts: factorisations that it took.
        dead: columns that no calibration input excites.
        ordering: of the sweep.
        fallback: why `weight` is rounded to nearest after all, or None. A caller reports it.
    """

    weight: AffineWeight
    loss_before: float | None
    loss_after: float
    damping: float
    attempts: int
    dead: int
    ordering: str
    fallback: str | None = None


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: AffineFormat,
    options: GptqOptions = GptqOptions(),
    *,
    cross: torch.Tensor | None = None,
    per_tensor: bool = False,
) -> GptqResult:
    """Quantize one weight.

    Deterministic: equal tensors, options, versions and number of threads give equal bits. Another number of threads, or
    another machine, may sum products in another order and turn a tie.

    Args:
        weight: float `[n, k]`, finite.
        hessian: mean x xᵀ of the layer's inputs, float32 or float64 `[k, k]`, symmetric, on the device of `weight`.
        format: of the result.
        cross: mean (x̃ − x) xᵀ `[k, k]`, x̃ the input of the float model: the loss is then that of W̃ x against W x̃.
        per_tensor: one scale for the whole matrix; the format's group is 0.

    Raises:
        ValueError: NaN or infinite entries, shapes that do not fit, a range that float16 scales cannot hold, or ordering
            `activation` with live groups.
    """
    n, k = weight.shape
    _check(weight, hessian, format, options, cross, per_tensor)
    dead = int((hessian.diagonal() == 0).sum())
    order = order_columns(hessian.diagonal(), options.ordering, format.group, options.block)
    factor = factorise(hessian, options.damping, options.floor, order.permutation, options.dtype)
    if isinstance(factor, NotFactored):
        rounded = affine.fit(weight, format, "mse", per_tensor=per_tensor)
        loss = _loss(weight, rounded, hessian, cross)
        return GptqResult(rounded, loss, loss, factor.damping, factor.attempts, dead, options.ordering, factor.reason)
    layer = _layer(hessian, format, options, order, factor, cross)
    solved, nearest, before, after = _solve(layer, weight, per_tensor)
    result = GptqResult(solved, before, after, factor.damping, factor.attempts, dead, options.ordering)
    if nearest is None or before is None or after <= before:
        return result
    reason = f"the layer loss after the sweep, {after:.4g}, is above that of rounding to nearest, {before:.4g}"
    return replace(result, weight=nearest, loss_after=before, fallback=reason)


def _check(weight, hessian, format, options, cross, per_tensor) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite entries")
    k = weight.shape[1]
    moments.check(hessian, k)
    if cross is not None:
        moments.check(cross, k, "cross statistic")
    if options.ordering == "activation" and options.groups == "live" and 0 < format.group < k:
        raise ValueError(
            "ordering 'activation' with live groups would scatter the columns of a group, and packed weights have no index "
            "to gather them at run time; use groups 'static', or ordering 'group_aware'"
        )
    if per_tensor and format.group:
        raise ValueError(f"one scale for the whole matrix has no groups of {format.group}: the format's group must be 0")


def _loss(weight: torch.Tensor, solved: AffineWeight, hessian: torch.Tensor, cross: torch.Tensor | None) -> float:
    dequantized = solved.dequantize()
    loss = moments.layer_loss(weight, dequantized, hessian)
    if cross is not None:
        w = weight.to(cross.dtype)
        loss += gptaq.linear_terms(w.T, (w - dequantized).T, cross).sum().item()
    return loss


@dataclass(frozen=True)
class _Layer:
    """What all rows share; `cross`, `mixing` and `importance` are in the order of the sweep."""

    format: AffineFormat
    options: GptqOptions
    order: Order
    factor: Factor
    cross: torch.Tensor | None
    mixing: torch.Tensor | None
    importance: torch.Tensor | None
    inverses: list[torch.Tensor]

    def columns(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, k]` -> contiguous `[k, n]` in the order and type of the sweep."""
        permutation = self.order.permutation
        rows = rows if permutation is None else rows.index_select(1, permutation)
        return rows.to(self.options.dtype).T.clone(memory_format=torch.contiguous_format)

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        """`[k, n]` in the order of the sweep -> contiguous `[n, k]`."""
        permutation = self.order.permutation
        return (columns if permutation is None else columns.index_select(0, torch.argsort(permutation))).T.contiguous()

    def natural(self, importance: torch.Tensor | None) -> torch.Tensor | None:
        return importance if importance is None else self.rows(importance[:, None])[0]

    def losses(self, weight: torch.Tensor, difference: torch.Tensor, damped: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of each row of D, `difference` `[k, n]`: diag(D (H + δ) Dᵀ), which may be known, without the part of δ."""
        damped = damped_losses(difference, self.factor.upper, self.options.block) if damped is None else damped
        losses = damped - self.factor.added.to(difference.dtype) @ difference.square()
        return losses if self.cross is None else losses + gptaq.linear_terms(weight, difference, self.cross)


def _layer(hessian: torch.Tensor, format, options, order, factor, cross) -> _Layer:
    p = order.permutation
    if cross is not None:
        cross = cross.to(options.dtype)
        cross = cross if p is None else cross.index_select(0, p).index_select(1, p)
    mixing = gptaq.mixing(cross, factor.upper) if cross is not None and options.correction == "channel" else None
    importance = None
    if options.importance != "uniform":
        diagonal = hessian.diagonal() if p is None else hessian.diagonal()[p]
        importance = diagonal if options.importance == "activation" else factor.upper.diagonal().square()
        importance = (importance.double() / importance.double().mean()).float()
    return _Layer(format, options, order, factor, cross, mixing, importance, block_inverses(factor.upper, order))


def _solve(
    layer: _Layer, weight: torch.Tensor, per_tensor: bool
) -> tuple[AffineWeight, AffineWeight | None, float | None, float]:
    """The weight, the one rounded to nearest, and the losses of both. Rows in pieces: given R, no row knows of another."""
    options, format = layer.options, layer.format
    whole = None
    if per_tensor:
        whole = affine.fit(weight, format, options.clipping, options.norm, True, layer.natural(layer.importance))
    parts: list[AffineWeight] = []
    rounded: list[AffineWeight] = []
    before = after = torch.zeros((), dtype=torch.float64, device=weight.device)
    size = min(ROWS, max(512, ELEMENTS // weight.shape[1])) if weight.device.type == "cpu" else ROWS_ELSEWHERE
    pieces = range(0, len(weight), size)
    for start in pieces:
        rows = slice(start, start + pieces.step)
        columns = layer.columns(weight[rows])
        known, passes = (_first_grids(layer, weight[rows]), options.passes) if whole is None else (_rows(whole, rows), 1)
        if options.compare:
            if known is None or (options.clipping != "mse" and not per_tensor):
                rounded.append(affine.fit(weight[rows], format, "mse"))
            else:
                rounded.append(known)
            before = before + layer.losses(columns, columns - layer.columns(rounded[-1].dequantize())).sum()
        part, losses = _sweeps(layer, columns, known, passes)
        parts.append(part)
        after = after + losses.sum()
    if not options.compare:
        return _joined(parts, format), None, None, after.item()
    return _joined(parts, format), _joined(rounded, format), before.item(), after.item()


def _joined(parts: list[AffineWeight], format: AffineFormat) -> AffineWeight:
    """Rows that were solved apart."""
    zeros = None if format.symmetric else torch.cat([p.zeros for p in parts if p.zeros is not None])
    return AffineWeight(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), zeros, format)


def _first_grids(layer: _Layer, weight: torch.Tensor) -> AffineWeight | None:
    """`weight` `[n, k]` rounded on the grids that the first sweep starts from; None where it finds its own on the way."""
    options = layer.options
    if options.groups != "static" and layer.order.begins:
        return None
    # Where one group is all, nothing has changed when it is reached: live and static are the same.
    factors = affine.COARSE if options.passes > 1 else affine.SHRINK
    importance = layer.natural(layer.importance)
    return affine.fit(weight, layer.format, options.clipping, options.norm, importance=importance, factors=factors)


def _sweeps(
    layer: _Layer, columns: torch.Tensor, known: AffineWeight | None, passes: int
) -> tuple[AffineWeight, torch.Tensor]:
    """Solve some rows, `columns` `[k, n]` in the order of the sweep; also their losses `[n]`.

    Args:
        known: the first sweep's grids, unless it finds its own.
    """
    options, format = layer.options, layer.format
    counted = layer.natural(layer.importance)
    factors = affine.COARSE if passes > 1 else affine.SHRINK
    target = columns
    if layer.cross is not None and options.correction == "target":
        target = gptaq.target(columns, layer.cross, layer.factor.upper)
    best: tuple[AffineWeight, torch.Tensor] | None = None
    for index in range(passes):
        grids = _grids(layer, columns, known)
        swept = sweep(target, layer.factor.upper, layer.order, format, grids, layer.mixing, layer.inverses)
        zeros = None if format.symmetric else grids.zeros.T.to(swept.codes.dtype).contiguous()
        found = AffineWeight(layer.rows(swept.codes), grids.scales.T.half().contiguous(), zeros, format)
        if layer.cross is None:
            losses = layer.losses(columns, swept.difference, swept.losses)
        else:
            losses = layer.losses(columns, columns - layer.columns(found.dequantize()))
        best = (found, losses) if best is None else _better(best, (found, losses))
        if index + 1 < passes:
            seen = layer.rows(swept.seen)
            known = affine.fit(seen, format, "mse", options.norm, importance=counted, factors=factors)
    assert best is not None
    return best


def _grids(layer: _Layer, columns: torch.Tensor, known: AffineWeight | None) -> Grids:
    format, options = layer.format, layer.options
    if known is not None:
        scales = known.scales.T.to(columns.dtype).contiguous()
        zeros = torch.full_like(scales, format.center) if known.zeros is None else known.zeros.T.to(columns.dtype).contiguous()
        return Grids(scales, zeros, format)

    def fit(group: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        counted = None if layer.importance is None else layer.importance[first:last]
        return affine.fit_group(group, format, options.clipping, options.norm, counted)

    empty = columns.new_empty(format.groups(len(columns)), columns.shape[1])
    return Grids(empty, torch.empty_like(empty), format, fit)


def _better(
    one: tuple[AffineWeight, torch.Tensor], other: tuple[AffineWeight, torch.Tensor]
) -> tuple[AffineWeight, torch.Tensor]:
    """Of each row the one with the lower loss, the first where they are equal."""
    wins = other[1] < one[1]
    choose = lambda a, b: torch.where(wins[:, None], b, a)  # noqa: E731
    (a, lost), (b, won) = one, other
    zeros = None if a.zeros is None or b.zeros is None else choose(a.zeros, b.zeros)
    chosen = AffineWeight(choose(a.codes, b.codes), choose(a.scales, b.scales), zeros, a.format)
    return chosen, torch.where(wins, won, lost)


def _rows(solved: AffineWeight, rows: slice) -> AffineWeight:
    zeros = None if solved.zeros is None else solved.zeros[rows]
    return AffineWeight(solved.codes[rows], solved.scales[rows], zeros, solved.format)
