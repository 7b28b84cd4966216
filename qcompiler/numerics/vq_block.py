"""One block of columns under a quadratic form: indices, codebooks and scales that make Σ_r (x_r − q_r) M (x_r − q_r)ᵀ least.

q = S · C[index], vectors of d columns next to each other, S by row and group of columns, C by group of rows. Three moves, each
exact given the rest: the index of one vector after another (`visit`), all entries together (`solve_codebooks`, a linear
system by conjugate gradients), the scales of a row together (`solve_scales`). None needs x: what they need is q and the
gradient F = M (x − q).

Tensors are transposed, `[columns, n]` with n = G · rows: a column lies in one piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.numerics.clusters import Clusters
from qcompiler.numerics.codebook import Nearest, invert_small, solve_small, symmetric, triangle

PIECE = 32  # columns whose changes are carried to the columns after them together
ELEMENTS = 2**18  # errors of one vector of all rows that are visited together, on a processor


@dataclass
class Block:
    """The state of a block; w columns, v = w / d vectors, G groups of rows.

    Attributes:
        entries: C `[G, K, d]`, values as stored.
        indices: int32 `[v, n]`.
        scales: S `[groups, n]`, values as stored; 0 for rows of padding.
        group: of each vector, positions in `scales`.
        real: `[w, 1]`, 0 for columns of padding and 1 for others, or None where there is no padding.
    """

    entries: torch.Tensor
    indices: torch.Tensor
    scales: torch.Tensor
    group: list[int]
    real: torch.Tensor | None = None

    @property
    def dim(self) -> int:
        return self.entries.shape[2]

    def spread(self, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Scales of every vector, `[v, n]`."""
        scales = self.scales if scales is None else scales
        if len(scales) == 1:
            return scales.expand(len(self.group), -1)
        return scales[torch.tensor(self.group, device=scales.device)]

    def flat(self) -> torch.Tensor:
        """Indices into the entries of all groups of rows, one after another, int64 `[v · n]`."""
        count, groups = self.entries.shape[1], self.entries.shape[0]
        base = torch.arange(groups, device=self.indices.device).mul_(count)
        return (self.indices.view(len(self.indices), groups, -1) + base[:, None]).view(-1)

    def gather(self, entries: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """C[index], `[v, d, n]`, with columns of padding 0."""
        vectors, n = self.indices.shape
        made = entries.new_empty(vectors, self.dim, n)
        for j in range(self.dim):
            made[:, j] = entries[..., j].reshape(-1).index_select(0, flat).view(vectors, n)
        if self.real is not None:
            made.mul_(self.real.view(vectors, self.dim, 1))
        return made

    def decode(self) -> torch.Tensor:
        """q `[w, n]`."""
        return self.gather(self.entries, self.flat()).mul_(self.spread()[:, None]).view(-1, self.indices.shape[1])

    def clusters(self, flat: torch.Tensor) -> Clusters:
        """Those of the entries of all groups."""
        return Clusters(flat, self.entries.shape[0] * self.entries.shape[1])

    def add(self, values: torch.Tensor, clusters: Clusters) -> torch.Tensor:
        """The transpose of `gather`: sums `values` `[v, d, n]` into `[G, K, d]`."""
        groups, count, dim = self.entries.shape
        if self.real is not None:
            values = values * self.real.view(-1, dim, 1)
        total = [clusters.sums(values[:, j].reshape(-1)) for j in range(dim)]
        return torch.stack(total, -1).view(groups, count, dim)


class Form:
    """A metric M `[w, w]` and what its moves need of it."""

    def __init__(self, metric: torch.Tensor, dim: int, real: torch.Tensor | None = None) -> None:
        """`real` `[w, 1]`: 0 for columns of padding, which nothing is to depend on."""
        if real is not None:
            metric = metric * real * real.T
            metric.diagonal().add_(1 - real[:, 0])  # only to have an inverse: their errors are 0
        self.metric, self.dim = metric, dim
        self.own = diagonal_blocks(metric, dim)
        inverse = torch.linalg.inv(self.own)
        self.inverse = inverse
        self.coupling = remove_blocks((inverse @ metric.view(len(inverse), dim, -1)).view(metric.shape), dim)
        self.choice = self.own if real is None else self.own * real.view(-1, dim, 1) * real.view(-1, 1, dim)

    def newton(self, gradient: torch.Tensor) -> torch.Tensor:
        """Each vector's step to its own minimum, M_PP⁻¹ F_P."""
        return torch.bmm(self.inverse, gradient.view(len(self.inverse), self.dim, -1)).view(gradient.shape)


def diagonal_blocks(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """`[w, w]` -> `[w / d, d, d]`."""
    count = len(matrix) // dim
    return matrix.view(count, dim, count, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def remove_blocks(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """`matrix` `[w, w]`, with zeros in the d x d blocks of its diagonal."""
    count = len(matrix) // dim
    matrix.view(count, dim, count, dim).diagonal(dim1=0, dim2=2).zero_()
    return matrix


def visit(
    base: torch.Tensor,
    coupling: torch.Tensor,
    choice: torch.Tensor,
    block: Block,
    nearest: Nearest,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the index of one vector after another; `block.indices` is overwritten.

    A vector P gets the entry that is nearest to V_P = base_P − Σ coupling[P, l] Δ_l in the metric `choice`, the sum over the
    vectors visited before it. Two uses:

    - re-assignment: `before` is q as it was, Δ = q_new − q_old; base is each vector's minimum while the others stay.
    - the sweep of GPTQ: `before` is None, Δ = V − q, what the columns after it take over.

    Args:
        base: `[w, n]`, overwritten.
        coupling: `[w, w]`.
        choice: `[v, d, d]`.

    Returns:
        q `[w, n]`.
    """
    groups, count, dim = block.entries.shape
    rows = base.shape[1] // groups
    step = max(1, ELEMENTS // (rows * count)) if base.device.type == "cpu" else groups
    if step >= groups:
        return _visit(base, coupling, choice, block, nearest, before)
    made = torch.empty_like(base)
    for first in range(0, groups, step):
        some, columns = slice(first, first + step), slice(first * rows, (first + step) * rows)
        part = Block(
            block.entries[some], block.indices[:, columns].contiguous(), block.scales[:, columns].contiguous(),
            block.group, block.real,
        )  # fmt: skip
        own = None if before is None else before[:, columns]
        own = None if own is None else own.contiguous()
        made[:, columns] = _visit(base[:, columns].contiguous(), coupling, choice, part, nearest, own)
        block.indices[:, columns] = part.indices
    return made


def _visit(base, coupling, choice, block: Block, nearest: Nearest, before) -> torch.Tensor:
    groups, count, dim = block.entries.shape
    width, n = base.shape
    vectors, piece = width // dim, max(PIECE // dim, 1) * dim
    made, change = torch.empty_like(base), torch.zeros_like(base)
    # Views of all vectors are made at once, and space is used again: a call costs as much as the arithmetic of small layers.
    values, mades, changes = (t.view(vectors, dim, n).unbind() for t in (base, made, change))
    befores = None if before is None else before.view(vectors, dim, n).unbind()
    choices = choice.unbind()
    scales = block.scales.unbind()
    inverses = torch.where(block.scales == 0, 0.0, 1 / block.scales).unbind()
    columns = block.entries.reshape(-1, dim).T.contiguous()
    start = torch.arange(groups, dtype=nearest.word, device=base.device).mul_(count)
    start = start.repeat_interleave(n // groups).view(groups, -1)
    index = torch.empty_like(start)
    flat = index.view(-1)
    words = torch.empty(vectors, groups, n // groups, dtype=nearest.word, device=base.device)
    errors = base.new_empty(groups, n // groups, count)
    bits, found = errors.view(nearest.word), words.unbind()
    features = base.new_ones(dim + 2, n)  # M z, z M z and 1
    linear, constant = features[:dim], features[dim]
    in_groups = features.view(dim + 2, groups, -1).permute(1, 2, 0)
    value, scaled = base.new_empty(dim, n), base.new_empty(dim, n)
    squares = torch.stack([columns[i] * columns[j] * (1 if i == j else 2) for i, j in triangle(dim)])
    weights = torch.stack([choice[:, i, j] for i, j in triangle(dim)], 1)
    tables = base.new_ones(piece // dim, groups, dim + 2, count)
    tables[:, :, :dim] = -2 * block.entries.transpose(1, 2)
    ready = tables.unbind()
    for first in range(0, width, piece):
        last = min(first + piece, width)
        here, own = slice(first, last), slice(first // dim, last // dim)
        tables[: own.stop - own.start, :, dim + 1] = (weights[own] @ squares).view(-1, groups, count)  # c M_PP cᵀ
        # Vectors of the piece that have not been visited have changed nothing so far: 0. The product need not be cut.
        changed = change[here]
        shares = coupling[here, here].view(-1, dim, last - first).unbind()
        for at, vector in enumerate(range(own.start, own.stop)):
            if at:
                torch.addmm(values[vector], shares[at], changed, alpha=-1, out=value)
            else:
                value.copy_(values[vector])
            group = block.group[vector]
            torch.mul(value, inverses[group], out=scaled)
            torch.mm(choices[vector], scaled, out=linear)
            torch.sum(scaled.mul_(linear), 0, out=constant)
            torch.bmm(in_groups, ready[at], out=errors)
            bits.bitwise_and_(nearest.high).bitwise_or_(nearest.numbers)
            torch.amin(bits, 2, out=found[vector])
            torch.bitwise_and(found[vector], nearest.low, out=index)
            index.add_(start)
            torch.index_select(columns, 1, flat, out=mades[vector])
            mades[vector].mul_(scales[group])
            if block.real is not None:
                mades[vector].mul_(block.real[vector * dim : (vector + 1) * dim])
            if befores is None:
                torch.sub(value, mades[vector], out=changes[vector])
            else:
                torch.sub(mades[vector], befores[vector], out=changes[vector])
        base[last:].addmm_(coupling[last:, here], changed, alpha=-1)
    block.indices = (words & nearest.low).view(vectors, n).int()
    return made


def solve_codebooks(block: Block, form: Form, gradient: torch.Tensor, steps: int) -> torch.Tensor:
    """The entries that make the form least while indices and scales stay, `[G, K, d]`.

    Conjugate gradients from the entries as they are, at most `steps` of them, each group of rows a system of its own, with
    the d x d blocks on the diagonal of the normal matrix as preconditioner. No step increases the form.
    """
    dim, groups, count = block.dim, *block.entries.shape[:2]
    flat, scales = block.flat(), block.spread()[:, None]
    clusters = block.clusters(flat)
    shape = (len(block.indices), dim, -1)
    weights = block.spread().square().reshape(-1)
    diagonal = torch.stack(
        [
            clusters.sums((weights.view(len(form.own), -1) * form.choice[:, i, j, None]).view(-1))
            for i, j in triangle(dim)
        ]
    )
    diagonal = symmetric(diagonal.view(-1, groups, count).transpose(0, 1), dim)
    inverse = invert_small(diagonal)
    residual = block.add(gradient.view(shape) * scales, clusters)
    solution, towards = torch.zeros_like(block.entries), residual
    past = torch.ones(groups, dtype=residual.dtype, device=residual.device)
    for step in range(steps):
        conditioned = (inverse * residual[..., None, :]).sum(-1)
        product = (residual * conditioned).sum((1, 2))
        towards = conditioned if step == 0 else conditioned + _ratio(product, past)[:, None, None] * towards
        past = product
        image = block.gather(towards, flat).mul_(scales).view(gradient.shape)
        image = (form.metric @ image).view(shape)
        image = block.add(image.mul_(scales), clusters)
        length = _ratio(product, (towards * image).sum((1, 2)))[:, None, None]
        solution = solution + length * towards
        residual = residual - length * image
    return block.entries + solution


def _ratio(over: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    return torch.where(under > 0, over / under, 0.0)


def solve_scales(block: Block, form: Form, decoded: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The scales that make the form least while indices and entries stay, `[groups, n]`."""
    count, n = block.scales.shape
    own = torch.tensor(block.group, device=decoded.device)
    member = torch.zeros(count, len(own), dtype=decoded.dtype, device=decoded.device).scatter_(0, own[None], 1)
    member = member.repeat_interleave(block.dim, 1)
    unit = decoded.view(len(own), block.dim, n) * torch.where(block.scales == 0, 0.0, 1 / block.scales)[own][:, None]
    unit = unit.view(decoded.shape)
    right = member @ (unit * gradient)
    matrix = decoded.new_empty(n, count, count)
    for group in range(count):
        columns = member[group].bool()
        image = form.metric[:, columns] @ unit[columns]
        matrix[:, group] = (member @ image.mul_(unit)).T
    return block.scales + solve_small(matrix, right.T, torch.zeros_like(right.T)).T
