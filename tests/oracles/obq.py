"""OBQ (arXiv 2208.11580), literally: one weight at a time, with the inverse of what is left of H updated by elimination.

O(n k³): for k up to about 32. It knows nothing of factorisations, blocks or permuted matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def obq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rounded: Callable[[int, int, torch.Tensor], torch.Tensor],
    order: Sequence[int] | None = None,
) -> torch.Tensor:
    """W̃ float64 `[n, k]`.

    Args:
        weight: float64 `[n, k]`.
        hessian: float64 `[k, k]`, positive definite (damped already).
        rounded: `(row, column, live row [k])` -> the grid's value for `live[column]`.
        order: columns in the order in which every row rounds them; None: each row takes next the weight that costs least,
            (w_j − w̃_j)² / [H⁻¹]_jj.
    """
    result = torch.empty_like(weight)
    k = weight.shape[1]
    for row, original in enumerate(weight):
        live, inverse, left = original.clone(), torch.linalg.inv(hessian), list(range(k))
        for step in range(k):
            if order is None:
                costs = [((live[j] - rounded(row, j, live)) ** 2 / inverse[j, j]).item() for j in left]
                chosen = left[costs.index(min(costs))]
            else:
                chosen = order[step]
            value = rounded(row, chosen, live)
            live -= (live[chosen] - value) / inverse[chosen, chosen] * inverse[chosen]
            inverse -= torch.outer(inverse[:, chosen], inverse[chosen]) / inverse[chosen, chosen]
            result[row, chosen] = live[chosen] = value
            left.remove(chosen)
            inverse[chosen] = inverse[:, chosen] = 0  # rounding leaves traces of what was eliminated
    return result
