"""The published GPTVQ (arXiv 2402.15319) as its authors' program runs it, to compare with; written from its description.

Blocks of 128 columns in their order, damping 0.01 of the mean diagonal, U upper with U^T U the inverse. A codebook for
`rows` x `columns` weights, found when the sweep reaches them by 100 iterations of k-means that weigh columns by U_jj, seeded
by ranks of Mahalanobis distance; entries of 8 bits with a scale for each codebook. An entry is chosen by errors over U_jj,
each column of a vector feeds its own error forward. Codebooks are then trained, 25 steps of Adam, and rounded again.
"""

from __future__ import annotations

import torch

BLOCK = 128
DAMPING = 0.01
STEPS, RATE = 25, 1e-3
CHUNK = 2**22  # numbers of [groups, points, centroids, dim] at once


def published_gptvq(
    weight: torch.Tensor, hessian: torch.Tensor, dim: int, centroids: int, rows: int, columns: int = 256, iterations: int = 100
) -> torch.Tensor:
    """W̃ float32 `[n, k]` of `weight` `[n, k]` and `hessian` `[k, k]`; n is a multiple of `rows`, k of `dim`.

    Raises:
        torch.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    original, damped = weight.clone(), hessian.clone()
    live = weight.clone()
    n, k = weight.shape
    groups = n // rows
    dead = damped.diagonal() == 0
    damped[dead, dead] = 1
    live[:, dead] = 0
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codebooks: list[torch.Tensor] = []  # [groups, centroids, dim] for each block of columns
    indices: list[list[torch.Tensor]] = []  # for each of them, of each vector [groups, rows]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, factor = live[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for j in range(0, stop - start, dim):
            if (start + j) % columns == 0:
                some = live[:, start + j : start + j + columns]
                stiffness = upper.diagonal()[start + j : start + j + columns]
                codebooks.append(_k_means(some, stiffness, dim, centroids, groups, iterations))
                indices.append([])
            here = slice(j, j + dim)
            stiffness = factor.diagonal()[here]
            points = block[:, here].reshape(groups, rows, dim)
            chosen = _assign(points, codebooks[-1], (1 / stiffness).expand(rows, dim))
            indices[-1].append(chosen)
            entries = codebooks[-1].gather(1, chosen[..., None].expand(-1, -1, dim)).reshape(n, dim)
            error = (block[:, here] - entries) / stiffness
            block[:, j + dim :] -= error @ factor[here, j + dim :]
            errors[:, here] = error
        live[:, stop:] -= errors @ upper[start:stop, stop:]
    return _train(original, hessian, codebooks, [torch.stack(chosen, 2) for chosen in indices])


def _assign(points: torch.Tensor, entries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[G, N, d]`, `[G, K, d]`, `[N, d]` -> the nearest entry of each point `[G, N]`."""
    size = max(1, CHUNK // (points.shape[0] * entries.shape[1] * points.shape[2]))
    parts = []
    for some, counted in zip(points.split(size, 1), weights.split(size), strict=True):
        distance = (some[:, :, None] - entries[:, None]).square() * counted[:, None]
        parts.append(distance.sum(-1).argmin(-1))
    return torch.cat(parts, 1)


def _k_means(some: torch.Tensor, stiffness: torch.Tensor, dim: int, centroids: int, groups: int, iterations: int) -> torch.Tensor:
    points = some.reshape(groups, -1, dim)
    count = points.shape[1]
    weights = stiffness if dim > 1 else torch.ones_like(stiffness)
    weights = weights.reshape(-1, dim).repeat(count // (len(weights) // dim), 1)  # [N, d]: all rows of a group alike
    centred = points - points.mean(1, keepdim=True)
    precision = torch.linalg.pinv(centred.transpose(1, 2) @ centred)
    ranked = ((centred @ precision) * centred).sum(-1).argsort(1)
    ranks = torch.linspace(0, count - 1, centroids).round().long()
    entries = points.gather(1, ranked[:, ranks, None].expand(-1, -1, dim))
    for _ in range(iterations):
        chosen = _assign(points, entries, weights)[..., None].expand(-1, -1, dim)
        shares = weights.expand(groups, -1, -1)
        total = torch.zeros_like(entries).scatter_add_(1, chosen, points * shares)
        entries = total / torch.zeros_like(entries).scatter_add_(1, chosen, shares).clamp(min=1e-10)
    return _eight_bits(entries)


def _eight_bits(entries: torch.Tensor) -> torch.Tensor:
    scale = entries.abs().amax((1, 2), keepdim=True) / 127
    return (entries / scale).round().clamp(-128, 127) * scale


def _decode(codebooks: list[torch.Tensor], indices: list[torch.Tensor]) -> torch.Tensor:
    parts = []
    for entries, chosen in zip(codebooks, indices, strict=True):
        groups, rows, vectors = chosen.shape
        dim = entries.shape[2]
        flat = chosen.reshape(groups, -1, 1).expand(-1, -1, dim)
        parts.append(entries.gather(1, flat).reshape(groups * rows, vectors * dim))
    return torch.cat(parts, 1)


@torch.enable_grad()
def _train(
    weight: torch.Tensor, hessian: torch.Tensor, codebooks: list[torch.Tensor], indices: list[torch.Tensor]
) -> torch.Tensor:
    def loss_of(entries: list[torch.Tensor]) -> torch.Tensor:
        difference = weight - _decode(entries, indices)
        return ((difference @ hessian) * difference).sum()

    first, rate = loss_of(codebooks).detach(), RATE
    while True:
        trained = [entries.detach().clone().requires_grad_() for entries in codebooks]
        optimizer = torch.optim.Adam(trained, lr=rate)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(trained)
            if not loss <= first:
                break
            loss.backward()
            optimizer.step()
        else:
            return _decode([_eight_bits(entries.detach()) for entries in trained], indices).detach()
        rate /= 10
