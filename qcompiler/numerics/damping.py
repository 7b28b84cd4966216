"""Factor of a damped Hessian: H + diag(δ) = R Rᵀ with R upper triangular.

GPTQ is usually written with U, (H + diag(δ))⁻¹ = Uᵀ U. U is R⁻¹, and no sweep needs more of it than the small blocks on
its diagonal: one Cholesky factorisation (k³/3) takes the place of two and an inverse (k³·4/3), and nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

FIRST_STEP = 1e-4  # the damping that follows 0
LARGEST = 1.0


@dataclass(frozen=True)
class Factor:
    """R and how it came about.

    Attributes:
        upper: R `[k, k]`, of the permuted Hessian, zero below its diagonal.
        added: δ, float64 `[k]`, in the same order.
        damping: what worked, as a share of the mean of diag(H).
        attempts: factorisations that were tried, in whatever precision.
    """

    upper: torch.Tensor
    added: torch.Tensor
    damping: float
    attempts: int


@dataclass(frozen=True)
class NotFactored:
    """Why there is no R; `damping` is the last that was tried."""

    reason: str
    damping: float
    attempts: int


def factorise(
    hessian: torch.Tensor, damping: float, floor: float, permutation: torch.Tensor | None, dtype: torch.dtype
) -> Factor | NotFactored:
    """Factor H + diag(δ), with more damping, ten times at a time and at most 1, until that succeeds.

    δ = damping · mean(diag H), and what lifts a smaller diagonal entry to `floor` · mean(diag H). Each damping is tried in
    `dtype` and then in float64. A factorisation counts only if no pivot is within rounding of zero: below that, R is noise.

    Args:
        hessian: float `[k, k]`, symmetric, finite, not changed.
        permutation: int64 `[k]`: row i of R stands for row `permutation[i]` of H; natural order when None.
        dtype: of R.
    """
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    if not mean > 0:
        return NotFactored("the Hessian is zero: no calibration input reached the layer", damping, 0)
    attempts = 0
    for share in _escalation(damping):
        added = share * mean + (floor * mean - diagonal).clamp(min=0)
        for precision in dict.fromkeys((dtype, torch.float64)):
            attempts += 1
            upper = _factor(hessian, added, permutation, precision)
            if upper is not None:
                added = added if permutation is None else added[permutation]
                return Factor(upper.to(dtype), added, share, attempts)
    reason = f"the Hessian is not positive definite, not even with {share:g} of its mean diagonal added to its diagonal"
    return NotFactored(reason, share, attempts)


def _escalation(damping: float) -> Iterator[float]:
    while damping < LARGEST:
        yield damping
        damping = max(10 * damping, FIRST_STEP)
    yield LARGEST


def _factor(
    hessian: torch.Tensor, added: torch.Tensor, permutation: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """R in `dtype`, or None. At most two matrices of k × k are alive at a time."""
    # R Rᵀ with R upper is L Lᵀ of the matrix with rows and columns in reverse order.
    if permutation is None:
        matrix = hessian.to(dtype).flip(0, 1)
        added = added.flip(0)
    else:
        reverse = permutation.flip(0)
        matrix = hessian.to(dtype).index_select(0, reverse).index_select(1, reverse)
        added = added[reverse]
    diagonal = (matrix.diagonal().double() + added).to(dtype)
    matrix.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    del matrix
    # Rounding leaves an error of about √k · eps of a diagonal entry in its pivot.
    least = len(diagonal) ** 0.5 * torch.finfo(dtype).eps
    if failed or not (lower.diagonal().square() > least * diagonal).all():
        return None
    return lower.flip(0, 1)
