"""The sweep of GPTVQ over blocks of columns, and passes over all columns after it.

With H + diag(δ) = R Rᵀ, R upper, and U = R⁻¹, quantizing the d columns P of a vector jointly costs ‖(x − q) R_PP‖² of the
loss, x what the columns before have made of them, and (x − q) R_PP U_P,l is what later columns take over. The same holds for
a whole block B of columns: what later columns cannot take over of its error is ‖(x − q) R_BB‖². So when the sweep reaches
a block, its codebooks, scales and indices are first found one vector after another, as GPTQ does, and then refined together
under the metric R_BB R_BBᵀ. After the last block, passes refine each block again, under H + δ with all others as they are.

Weights are transposed here, `[columns, n]`, in the order of the sweep, rows padded to whole codebooks with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qcompiler.numerics import codebook
from qcompiler.numerics.codebook import Nearest
from qcompiler.numerics.vq_block import Block, Form, diagonal_blocks, remove_blocks, solve_codebooks, solve_scales, visit
from qcompiler.numerics.vq_codec import Codec, log_scales
from qcompiler.numerics.vq_plan import Plan, Span

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of the scale that covers a group, with fixed entries


@dataclass(frozen=True)
class Tuning:
    """What the solver may spend; see `GptvqOptions`."""

    iterations: int
    tolerance: float
    seeding: str
    rounds: int
    passes: int
    steps: int
    compare: bool = False


@dataclass
class Solved:
    """A piece of rows as it is stored, by the order of the sweep's blocks.

    Attributes:
        blocks: of each span; `codes` `[G, K, d]` and `steps` `[G]` of its entries.
        difference: W − W̃ `[k', n]`, W̃ / unit.
        rounded: the same where each vector has the entry nearest to it, of the codebooks that the blocks began with.
    """

    blocks: list[Coded]
    difference: torch.Tensor
    rounded: torch.Tensor | None = None


@dataclass
class Coded:
    """A block whose entries are codes times steps."""

    block: Block
    codes: torch.Tensor
    steps: torch.Tensor


class Rows:
    """Solves some rows that share their Hessian; `rows` of them share a codebook."""

    def __init__(
        self, columns: torch.Tensor, count: int, rows: int, layout: Plan, codec: Codec, tuning: Tuning, generator: torch.Generator
    ) -> None:
        """Args:
        columns: W / unit `[k', n']` in the order of the sweep, n' a multiple of `rows`; the rows from `count` on are padding.
        """
        self.columns, self.count, self.rows = columns, count, rows
        self.layout, self.codec, self.tuning, self.generator = layout, codec, tuning, generator
        self.shape = codec.shape
        self.single = len(layout.spans) == 1
        self.groups = columns.shape[1] // rows
        self.nearest = Nearest(self.shape.centroids, columns)
        position = torch.arange(columns.shape[1], device=columns.device)
        self.real = (position < count).to(columns.dtype)
        last = (self.groups - 1) * rows
        # Rows of padding have the values of others where points are seeded, and weigh nothing.
        self.source = torch.where(position < count, position, last + (position - last) % max(count - last, 1))
        self.whole: torch.Tensor | None = None
        if self.shape.scales != "none" and not self.shape.group:
            self.whole = self._root_mean_square(columns)
            if codec.table is not None:
                vectors = columns.view(-1, self.shape.dim, columns.shape[1])
                self.whole = self._searched(vectors, torch.eye(self.shape.dim).to(columns).expand(len(vectors), -1, -1))

    # ---- the sweep

    def sweep(self, upper: torch.Tensor | None) -> Solved:
        """All blocks once; `upper` is R in the order of the sweep, None for the identity."""
        difference = torch.empty_like(self.columns)
        rounded = torch.empty_like(self.columns) if self.tuning.compare else None
        blocks: list[Coded] = []
        # Where one block is all, a pass after the sweep would be more of the same rounds.
        rounds = self.tuning.rounds + (self.single and self.tuning.passes > 0)
        alone = self.tuning.rounds == 0
        for span in self.layout.spans:
            here, before = slice(span.start, span.stop), slice(0, span.start)
            live = self.columns[here]
            if upper is None:
                own = torch.eye(span.stop - span.start, dtype=live.dtype, device=live.device)
                inverse = own
            else:
                own = upper[here, here]
                inverse = torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=own.dtype, device=own.device), upper=True)
                if span.start:
                    live = torch.addmm(live, inverse.T, upper[before, here].T @ difference[before])
            form = Form(own @ own.T, self.shape.dim, span.real if span.real is None else span.real.to(own.dtype))
            stiffness = diagonal_blocks(own, self.shape.dim)  # R_PP
            feedback = torch.bmm(stiffness, inverse.view(-1, self.shape.dim, len(own)))
            feedback = remove_blocks(feedback.view(own.shape), self.shape.dim).T.contiguous()
            choice = stiffness @ stiffness.mT
            if span.real is not None:
                choice = choice * span.real.view(-1, self.shape.dim, 1) * span.real.view(-1, 1, self.shape.dim)
            coded = self._begin(span, live, choice)
            if rounded is not None:
                nearest = self._round(span, replace(coded.block), self.columns[here])
                torch.sub(self.columns[here], nearest, out=rounded[here])
            if upper is None:
                decoded = self._round(span, coded.block, live)
            else:
                decoded = visit(live.clone(), feedback, choice, coded.block, self.nearest)
            gradient = form.metric @ (live - decoded)
            decoded = self.refine(coded, form, decoded, gradient, rounds, alone, alone)
            torch.sub(self.columns[here], decoded, out=difference[here])
            blocks.append(coded)
        return Solved(blocks, difference, rounded)

    def _round(self, span: Span, block: Block, columns: torch.Tensor) -> torch.Tensor:
        """Give each vector of `columns` the entry nearest to it; returns q."""
        alone = torch.eye(block.dim, dtype=columns.dtype, device=columns.device).expand(len(block.group), -1, -1)
        if block.real is not None:
            alone = alone * block.real.view(-1, block.dim, 1)
        _, features = self.features(span, columns, alone, block.scales, scaled=False)
        numbers = self.nearest(features, codebook.table(block.entries))[0]
        numbers = numbers.view(self.groups, len(block.group), -1).transpose(0, 1)
        block.indices = numbers.reshape(len(block.group), -1).int()
        return block.decode()

    def improve(
        self, solved: Solved, product: Callable[[slice, torch.Tensor], torch.Tensor], metric: Callable, frozen: bool = False
    ) -> None:
        """One pass: each block refined while the others stay; where a block has no rounds, its indices alone, once.

        Args:
            product: (positions B, D) -> (H + δ)[B, :] D.
            metric: positions B -> (H + δ)[B, B].
            frozen: codebooks stay.
        """
        if self.whole is not None and self.shape.scales == "fp16" and not self.single and self.tuning.rounds:
            self._row_scales(solved, product)
        for span, coded in zip(self.layout.spans, solved.blocks, strict=True):
            here = slice(span.start, span.stop)
            form = Form(metric(here), self.shape.dim, span.real if span.real is None else span.real.to(self.columns.dtype))
            gradient = product(here, solved.difference)
            if span.real is not None:
                gradient = gradient * span.real
            rounds, alone = max(1, self.tuning.rounds), self.tuning.rounds == 0
            decoded = self.refine(coded, form, coded.block.decode(), gradient, rounds, frozen or alone, alone)
            torch.sub(self.columns[here], decoded, out=solved.difference[here])

    def compress(self, solved: Solved) -> None:
        """Codebooks of one column as the product of two factors of half their rank.

        Sorted codebooks are much alike. The left factor, a row for each codebook, is int8 with a float16 scale; the right
        one, which all share, is float16.
        """
        entries = torch.cat([coded.block.entries for coded in solved.blocks])[..., 0]
        ordered, order = entries.sort(dim=1, stable=True)
        left, values, right = torch.linalg.svd(ordered, full_matrices=False)
        rank = max(1, self.shape.centroids // 2)
        step = (left * values)[:, :rank].abs().amax(1, keepdim=True) / 127
        step = torch.where(step > 0, step, 1.0).half().to(step.dtype)
        left = ((left * values)[:, :rank] / step).round().clamp(-128, 127) * step
        made = left @ right[:rank].half().to(left.dtype)
        place = torch.argsort(order, dim=1)
        for index, (span, coded) in enumerate(zip(self.layout.spans, solved.blocks, strict=True)):
            own = slice(index * self.groups, (index + 1) * self.groups)
            old = coded.block.indices.view(-1, self.groups, self.rows)
            new = place[own].gather(1, old.transpose(0, 1).reshape(self.groups, -1).long())
            new = new.view(self.groups, len(old), -1).transpose(0, 1).reshape(len(old), -1)
            coded.codes = made[own, :, None].contiguous()
            coded.block = replace(coded.block, entries=coded.codes, indices=new.int())
            here = slice(span.start, span.stop)
            torch.sub(self.columns[here], coded.block.decode(), out=solved.difference[here])

    # ---- a block

    def refine(
        self, coded: Coded, form: Form, decoded: torch.Tensor, gradient: torch.Tensor, rounds: int, frozen: bool = False,
        fixed: bool = False,
    ) -> torch.Tensor:
        """Rounds of entries (unless `frozen`), scales (unless `fixed`) and indices; a group of rows keeps the best.

        `gradient` is M (x − q); returns q.
        """  # fmt: skip
        scales = self.shape.scales == "fp16" and (self.shape.group > 0 or self.single) and not fixed
        for _ in range(rounds):
            start, first = replace(coded.block, indices=coded.block.indices.clone()), decoded
            trial, codes, steps = replace(start), coded.codes, coded.steps
            if self.codec.table is None and not frozen:
                entries = solve_codebooks(trial, form, gradient, self.tuning.steps)
                codes, steps = self.codec.codebooks(entries)
                trial = replace(trial, entries=codes * steps[:, None, None])
                changed = trial.decode()
                moved = gradient - form.metric @ (changed - first)
            else:
                changed, moved = first, gradient
            if scales:
                found = self.codec.scales(solve_scales(trial, form, changed, moved))
                trial = replace(trial, scales=torch.where(torch.isfinite(found), found, trial.scales))
                changed = trial.decode()
                moved = gradient - form.metric @ (changed - first)
            trial.indices = trial.indices.clone()
            base = changed + form.newton(moved)
            changed = visit(base, form.coupling, form.choice, trial, self.nearest, changed)
            step = changed - first
            image = form.metric @ step
            change = (step * (image - 2 * gradient)).sum(0).view(self.groups, self.rows).sum(1)
            better = change < 0
            rows = better.repeat_interleave(self.rows)
            coded.block = Block(
                torch.where(better[:, None, None], trial.entries, start.entries),
                torch.where(rows, trial.indices, start.indices), torch.where(rows, trial.scales, start.scales),
                start.group, start.real,
            )  # fmt: skip
            coded.codes = torch.where(better[:, None, None], codes, coded.codes)
            coded.steps = torch.where(better, steps, coded.steps)
            decoded = torch.where(rows, changed, first)
            gradient = gradient - image.mul_(rows)
        return decoded

    def _begin(self, span: Span, live: torch.Tensor, choice: torch.Tensor) -> Coded:
        """Scales and a codebook for a block that the sweep has reached."""
        groups = self.groups
        scales = self._scales(span, live, choice)
        vectors = len(span.group)
        indices = torch.zeros(vectors, live.shape[1], dtype=torch.int32, device=live.device)
        if self.codec.table is not None:
            codes, step = self.codec.table
            codes = codes.to(live.dtype).expand(groups, -1, -1).contiguous()
            steps = step.to(live.dtype).expand(groups).contiguous()
            return Coded(Block(codes * steps[:, None, None], indices, scales, span.group, span.real), codes, steps)
        points, features = self.features(span, live, choice, scales)
        if self.tuning.seeding == "k-means++":
            start = codebook.seed_plus_plus(points, features, self.shape.centroids, self.generator)
        else:
            start = codebook.seed_mahalanobis(points, self.shape.centroids)
        entries, _ = codebook.em(points, features, start, self.tuning.iterations, self.tuning.tolerance, self.nearest)
        codes, steps = self.codec.codebooks(entries)
        return Coded(Block(codes * steps[:, None, None], indices, scales, span.group, span.real), codes, steps)

    def features(
        self, span: Span, live: torch.Tensor, metric: torch.Tensor, scales: torch.Tensor, scaled: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What EM needs of a block: points x / S `[G, d, N]` and their features under `metric` `[v, d, d]`.

        A point weighs S², as the error S · (x / S − c) does, or 1 where `scaled` is false.
        """
        dim, groups, vectors = self.shape.dim, self.groups, len(span.group)
        spread = scales[torch.tensor(span.group, device=live.device)]  # [v, n]
        source = spread[:, self.source]
        points = live[:, self.source].view(vectors, dim, -1) * torch.where(source == 0, 0.0, 1 / source)[:, None]
        points = points.view(vectors, dim, groups, self.rows).permute(2, 1, 0, 3).reshape(groups, dim, -1)
        weights = spread.square() if scaled else self.real.expand(vectors, -1)
        weights = weights.reshape(vectors, groups, self.rows).transpose(0, 1).reshape(groups, -1)
        shared = metric.permute(1, 2, 0)[..., None].expand(-1, -1, -1, self.rows).reshape(dim, dim, -1)
        return points, codebook.features(points, shared, weights)

    # ---- scales

    def largest(self, span: Span, live: torch.Tensor) -> torch.Tensor:
        """The largest of each group of a block's columns instead, `[groups, n]`."""
        if self.shape.scales == "none" or self.whole is not None:
            return self._scales(span, live, None)
        own = torch.tensor(span.group, device=live.device).repeat_interleave(self.shape.dim)
        found = torch.stack([live[own == group].abs().amax(0) for group in range(len(span.groups))]) * self.real
        return log_scales(found) if self.shape.scales == "log4" else self.codec.scales(found)

    def _scales(self, span: Span, live: torch.Tensor, choice: torch.Tensor | None) -> torch.Tensor:
        """Of each group of a block's columns, `[groups, n]`."""
        if self.shape.scales == "none":
            return self.real.expand(1, -1).contiguous()
        if self.whole is not None:
            return self.whole
        if choice is not None and self.codec.table is not None:
            members = torch.tensor(span.group, device=live.device)
            vectors = live.view(len(members), self.shape.dim, -1)
            groups = range(len(span.groups))
            return torch.cat([self._searched(vectors[members == g], choice[members == g]) for g in groups])
        own = torch.tensor(span.group, device=live.device).repeat_interleave(self.shape.dim)
        found = torch.cat([self._root_mean_square(live[own == group]) for group in range(len(span.groups))])
        return log_scales(found) if self.shape.scales == "log4" else self.codec.scales(found)

    def _root_mean_square(self, columns: torch.Tensor) -> torch.Tensor:
        return self.codec.scales(columns.square().mean(0, keepdim=True).sqrt() * self.real)

    def _searched(self, vectors: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """With fixed entries: the factor on the scale that just covers all of a group that makes its error least.

        Args:
            vectors: `[v, d, n]`.
            metric: `[v, d, d]`.
        """
        assert self.codec.table is not None
        codes, step = self.codec.table
        entries = codes.to(vectors.dtype) * step.to(vectors.dtype)
        largest = vectors.abs().amax((0, 1)) / entries.abs().max()
        points = vectors.permute(2, 1, 0)  # [n, d, v]
        shared = metric.permute(1, 2, 0)
        ones = points.new_ones(len(points), points.shape[2])
        table = codebook.table(entries[None]).expand(len(points), -1, -1)
        best, least = largest, torch.full_like(largest, torch.inf)
        for factor in SHRINK:
            scale = self.codec.scales(largest * factor)
            inverse = torch.where(scale == 0, 0.0, 1 / scale)
            features = codebook.features(points * inverse[:, None, None], shared, ones)
            error = self.nearest(features, table)[1].sum(1) * scale.square()
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return (best * self.real)[None]

    def _row_scales(self, solved: Solved, product: Callable) -> None:
        """Scales of whole rows, which all blocks share, made best while everything else stays."""
        assert self.whole is not None
        inverse = torch.where(self.whole == 0, 0.0, 1 / self.whole)
        unit = (self.columns - solved.difference).mul_(inverse)
        right, length = torch.zeros_like(self.whole), torch.zeros_like(self.whole)
        for span in self.layout.spans:
            here = slice(span.start, span.stop)
            right += (product(here, solved.difference) * unit[here]).sum(0)
            length += (product(here, unit) * unit[here]).sum(0)
        found = self.codec.scales(self.whole + torch.where(length > 0, right / length, 0.0))
        step = found - self.whole
        better = (step * (step * length - 2 * right) < 0) & torch.isfinite(found)
        self.whole = torch.where(better, found, self.whole)
        for span, coded in zip(self.layout.spans, solved.blocks, strict=True):
            here = slice(span.start, span.stop)
            coded.block = replace(coded.block, scales=self.whole)
            torch.sub(self.columns[here], coded.block.decode(), out=solved.difference[here])
