"""Codebooks by expectation maximisation: K entries c of d numbers that make Σ w_i (x_i − c) M_i (x_i − c)ᵀ least.

Everything that EM needs of a point is in d + d·(d+1)/2 + 1 numbers, its features:

    y = w M x,   the upper triangle of A = w M,   e = w x M xᵀ,

a point's error with an entry being e − 2 c·y + c A cᵀ. So the errors of all points with all entries are one matrix product
of features and what a table holds of its entries, and the entry that is best for a cluster follows from its features' sum.
"""

from __future__ import annotations

import torch

from qcompiler.numerics.clusters import Clusters, cumulative

ELEMENTS = 2**18  # errors that are held at once: what a processor's second cache holds
ELSEWHERE = 2**27
SAMPLE = 16


def triangle(dim: int) -> list[tuple[int, int]]:
    """The upper triangle of a symmetric matrix in the order of the features."""
    return [(i, j) for i in range(dim) for j in range(i, dim)]


def features(points: torch.Tensor, metric: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[G, d, N]` points, `[d, d, N]` or `[d, d, G, N]` M, `[G, N]` w -> `[G, features, N]`."""
    dim = points.shape[1]
    metric = metric if metric.dim() == 4 else metric[:, :, None]
    made = points.new_empty(points.shape[0], dim + dim * (dim + 1) // 2 + 1, points.shape[2])
    for i in range(dim):
        made[:, i] = sum(metric[i, j] * points[:, j] for j in range(dim))
    made[:, -1] = (made[:, :dim] * points).sum(1)
    for at, (i, j) in enumerate(triangle(dim), dim):
        made[:, at] = metric[i, j]
    return made.mul_(weights[:, None])


def table(entries: torch.Tensor) -> torch.Tensor:
    """Entries `[G, K, d]` -> what features are multiplied by, `[G, features, K]`."""
    dim = entries.shape[2]
    columns = entries.unbind(2)
    squares = [columns[i] * columns[j] * (1 if i == j else 2) for i, j in triangle(dim)]
    return torch.stack([*(-2 * c for c in columns), *squares, torch.ones_like(columns[0])], 1)


class Nearest:
    """Finds the least of K errors of each point, in pieces of a buffer that is used again.

    An argmin costs several times what the errors do. Instead the number of the entry takes the place of the last bits of
    the error, and the least of these words is found, which is fast: errors are not negative, and the words of such floats
    are in their order. Errors that agree in all but log2 K of their bits count as equal: the lowest number wins.
    """

    def __init__(self, entries: int, like: torch.Tensor) -> None:
        """For `entries` entries, and the type and device of `like`."""
        self.word = torch.int32 if like.dtype == torch.float32 else torch.int64
        self.bits = 2 ** max(entries - 1, 1).bit_length() - 1
        self.entries, self.dtype = entries, like.dtype
        self.numbers = torch.arange(entries, dtype=self.word, device=like.device)
        # Of no dimension, but tensors: numbers would be made into tensors at each use, which costs more than the use.
        self.low = torch.tensor(self.bits, dtype=self.word, device=like.device)
        self.high = ~self.low
        self.size = ELEMENTS if like.device.type == "cpu" else ELSEWHERE
        self.buffer = like.new_empty(0)

    def __call__(self, features: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[G, features, N]`, `[G, features, K]` -> number int64 and error of the nearest entry, `[G, N]` each."""
        words = self.words(features, table)
        return (words & self.low).long(), (words & self.high).view(self.dtype)

    def words(self, features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The least word of each point, `[G, N]`."""
        groups, _, count = features.shape
        words = torch.empty(groups, count, dtype=self.word, device=features.device)
        across = max(1, min(count, self.size // self.entries))
        down = max(1, min(groups, self.size // (self.entries * across)))
        if self.buffer.numel() < down * across * self.entries:
            self.buffer = features.new_empty(down * across * self.entries)
        for top in range(0, groups, down):
            rows = slice(top, min(top + down, groups))
            for left in range(0, count, across):
                columns = slice(left, min(left + across, count))
                shape = (rows.stop - top, columns.stop - left, self.entries)
                errors = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.bmm(features[rows, :, columns].transpose(1, 2), table[rows], out=errors)
                packed = errors.view(self.word).bitwise_and_(self.high).bitwise_or_(self.numbers)
                words[rows, columns] = packed.amin(2)
        return words


def sums(features: torch.Tensor, assignment: torch.Tensor, entries: int) -> torch.Tensor:
    """Features `[G, features, N]` summed over the points of each cluster, `[G, features, K]`."""
    groups, count, _ = features.shape
    if features.device.type == "cpu":
        total = features.new_zeros(groups, count, entries)
        return total.scatter_add_(2, assignment[:, None].expand(-1, count, -1), features)
    base = torch.arange(groups, device=features.device).mul_(entries)
    clusters = Clusters((assignment + base[:, None]).view(-1), groups * entries)
    return torch.stack([clusters.sums(features[:, at].reshape(-1)).view(groups, -1) for at in range(count)], 1)


def symmetric(triangles: torch.Tensor, dim: int) -> torch.Tensor:
    """`[G, d·(d+1)/2, K]` -> `[G, K, d, d]`."""
    full = triangles.new_empty(triangles.shape[0], triangles.shape[2], dim, dim)
    for at, (i, j) in enumerate(triangle(dim)):
        full[..., i, j] = full[..., j, i] = triangles[:, at]
    return full


def invert_small(matrices: torch.Tensor) -> torch.Tensor:
    """Many d x d positive semidefinite matrices `[…, d, d]` inverted, with a ridge on their diagonals.

    The ridge is a few units in the last place of the trace, and 1 where the matrix is 0.
    """
    dim = matrices.shape[-1]
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(trace > 0, trace * (8 * torch.finfo(matrices.dtype).eps), 1.0)
    if dim == 1:
        return 1 / (matrices + ridge[..., None, None])
    if dim == 2:
        a, b, c = matrices[..., 0, 0] + ridge, matrices[..., 0, 1], matrices[..., 1, 1] + ridge
        return torch.stack([c, -b, -b, a], -1).div_((a * c - b * b)[..., None]).view(matrices.shape)
    lifted = matrices + ridge[..., None, None] * torch.eye(dim, dtype=matrices.dtype, device=matrices.device)
    if matrices.is_cuda:
        return inverse_of_many(lifted)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(lifted)[0])


def inverse_of_many(matrices: torch.Tensor) -> torch.Tensor:
    """Of positive definite matrices `[…, d, d]`, L⁻ᵀ L⁻¹ of their factors: steps that a GPU has for a whole batch.

    torch.cholesky_inverse goes through a batch there one matrix after another, of which a block of columns has some ten thousand.
    """
    lower = torch.linalg.cholesky_ex(matrices)[0]
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.mT @ inverse


def solve_small(matrices: torch.Tensor, right: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """x of A x = y for many small A `[…, d, d]` and y `[…, d]`, near `otherwise` where A says nothing; see `invert_small`."""
    right = right - (matrices * otherwise[..., None, :]).sum(-1)
    return otherwise + (invert_small(matrices) * right[..., None, :]).sum(-1)


def update(total: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The best entries `[G, K, d]` for clusters with sums `total` `[G, features, K]`; those of no weight stay."""
    dim = before.shape[2]
    matrices = symmetric(total[:, dim:-1], dim)
    return solve_small(matrices, total[:, :dim].transpose(1, 2), before)


def seed_mahalanobis(points: torch.Tensor, entries: int) -> torch.Tensor:
    """`[G, d, N]` -> `[G, K, d]`: points at equal ranks of their Mahalanobis distance from the mean, first and last too."""
    centred = points - points.mean(2, keepdim=True)
    scatter = centred @ centred.transpose(1, 2)
    dim = points.shape[1]
    trace = scatter.diagonal(dim1=1, dim2=2).sum(1)
    eye = torch.eye(dim, dtype=points.dtype, device=points.device)
    ridge = torch.where(trace > 0, 1e-6 * trace, 1.0)  # constant groups have no scatter
    precision = torch.linalg.inv(scatter + ridge[:, None, None] * eye)
    ranked = ((precision @ centred) * centred).sum(1).argsort(stable=True, dim=1)
    ranks = torch.linspace(0, points.shape[2] - 1, entries, device=points.device).round().long()
    return points.gather(2, ranked[:, None, ranks].expand(-1, dim, -1)).transpose(1, 2).contiguous()


def seed_plus_plus(points: torch.Tensor, features: torch.Tensor, entries: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next entry a point, drawn in proportion to its error with the entries so far. `[G, K, d]`.

    Of many points a sample of `SAMPLE` · K serves as well. All groups take the same sample and the same random numbers, so
    that none depends on which others are there.
    """
    if points.shape[2] > SAMPLE * entries:
        some = torch.randperm(points.shape[2], generator=generator, device="cpu")[: SAMPLE * entries].to(points.device)
        points, features = points[..., some], features[..., some].contiguous()
    groups, dim, _ = points.shape
    draws = torch.rand(entries, generator=generator, dtype=torch.float64, device="cpu").to(points.device)
    made = points.new_empty(groups, entries, dim)
    errors = features[:, dim : 2 * dim].sum(1)  # the first: by weight, diag(A) or nearly
    for entry in range(entries):
        running = cumulative(errors.clamp(min=0).double())
        drawn = torch.searchsorted(running, draws[entry] * running[:, -1:])
        drawn = drawn.clamp(max=points.shape[2] - 1)
        made[:, entry] = points.gather(2, drawn[:, None].expand(-1, dim, -1))[..., 0]
        found = (table(made[:, entry, None]).transpose(1, 2) @ features)[:, 0]
        errors = found if entry == 0 else torch.minimum(errors, found)
    return made


def em(
    points: torch.Tensor,
    features: torch.Tensor,
    start: torch.Tensor,
    iterations: int,
    tolerance: float,
    nearest: Nearest,
    reseeded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate: each point to its nearest entry, each entry to the best of its points.

    Entries without points move to the points with the largest errors. No step increases the error. A group ends by itself:
    none depends on which others are there.

    Args:
        points, features: `[G, d, N]`, `[G, features, N]`.
        start: `[G, K, d]`.
        iterations: at most; at least one.
        tolerance: a group ends when an iteration takes less than this share off its error; never if negative.
        reseeded: otherwise entries without points become 0, and the error may increase.

    Returns:
        Entries `[G, K, d]`, and the error of all groups after each assignment, float64 `[iterations]`.
    """
    result, (count, dim) = start.clone(), start.shape[1:]
    going = torch.arange(len(start), device=start.device)
    entries, done = start, torch.zeros(len(start), dtype=torch.bool, device=start.device)
    last = torch.full((len(start),), torch.nan, dtype=torch.float64, device=start.device)  # no comparison holds at first
    shown, history = torch.zeros_like(last), []
    for _ in range(iterations):
        assignment, errors = nearest(features, table(entries))
        now = errors.sum(1, dtype=torch.float64)
        shown[going] = now
        history.append(shown.sum())
        total = sums(features, assignment, count)
        diagonal = [at for at, (i, j) in enumerate(triangle(dim), dim) if i == j]
        filled = total[:, diagonal].sum(1) > 0
        better = update(total, entries)
        full = filled.all(1)
        if not bool(full.all()):
            better = reseed(better, filled, points, errors) if reseeded else better * filled[..., None]
        entries = torch.where(done[:, None, None], entries, better)
        if tolerance < 0:
            continue
        done |= full & (last - now <= tolerance * last)
        last = now
        over = int(done.sum())
        if over == len(done):
            break
        if 2 * over > len(done):  # the groups that go on are worth a copy
            result[going[done]] = entries[done]
            some = ~done
            going, entries, last, done = going[some], entries[some], last[some], done[some]
            points, features = points[some], features[some]
    result[going] = entries
    return result, torch.stack(history)


def reseed(entries: torch.Tensor, filled: torch.Tensor, points: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Entries without points `[G, K]` moved to the points of their group with the largest errors."""
    groups, count = filled.shape
    rank = (~filled).cumsum(1) - 1
    worst = errors.topk(min(count, errors.shape[1]), 1).indices
    chosen = worst.gather(1, rank.clamp(0, worst.shape[1] - 1))
    moved = points.gather(2, chosen[:, None].expand(-1, points.shape[1], -1)).transpose(1, 2)
    # A point without error gains nothing, and many entries there would only be many times the same.
    useful = ~filled & (rank < worst.shape[1]) & (errors.gather(1, chosen) > 0)
    return torch.where(useful[..., None], moved, entries)
