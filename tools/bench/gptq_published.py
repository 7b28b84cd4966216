"""The published GPTQ (arXiv 2210.17323) with the defaults of its authors' program, to compare with; written from its description.

Blocks of 128 columns, damping 0.01 of the mean diagonal, columns in their order, min-max grids of which a group's is
fitted on the weight as the blocks before have left it, dead columns zeroed. Scales stay float32, which favours it.
"""

from __future__ import annotations

import torch

BLOCK = 128
DAMPING = 0.01


def published_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """W̃ float32 `[n, k]` of `weight` `[n, k]` and `hessian` `[k, k]`, asymmetric; a group has `group` columns.

    Raises:
        torch.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    weight, hessian = weight.clone(), hessian.clone()
    k = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, factor = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            if (start + j) % group == 0:
                scale, zero = _grid(weight[:, start + j : start + j + group], bits)
            column = block[:, j]
            rounded = scale * ((torch.round(column / scale) + zero).clamp(0, 2**bits - 1) - zero)
            result[:, start + j] = rounded
            error = (column - rounded) / factor[j, j]
            block[:, j:] -= error[:, None] * factor[j, j:][None]
            errors[:, j] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def _grid(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)
