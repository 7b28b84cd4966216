"""Asymmetric calibration: the quantized layer on its quantized inputs X against the float layer on its float inputs X̃.

min ‖W̃ X − W X̃‖² needs one statistic beside H = mean x xᵀ: C = mean (x̃ − x) xᵀ. Two ways to use it:

- `channel` (GPTAQ, arXiv 2504.02692): when column j is fixed, the columns after it take over what its own input lost,
  w_j (X̃_j − X_j). W[:, l] += w_j P[j, l] for l > j, P = ((C Uᵀ) ⊙ M) U with M the strictly upper mask.
- `target`: the quadratic form has its minimum at W* = W + W C (H + δ)⁻¹, and W* is swept in place of W.
"""

from __future__ import annotations

import torch


def mixing(cross: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """P, strictly upper `[k, k]`, of `cross` in the order and type of `upper`, which is R = U⁻¹."""
    product = torch.linalg.solve_triangular(upper.T, cross, upper=False, left=False).triu_(1)  # (C Uᵀ) ⊙ M
    return torch.linalg.solve_triangular(upper, product, upper=True, left=False)


def target(weight: torch.Tensor, cross: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """W + W C (H + δ)⁻¹ for `weight` `[k, n]`, transposed, and `cross` `[k, k]`, both in the order of `upper`."""
    product = cross.T @ weight
    product = torch.linalg.solve_triangular(upper, product, upper=True, left=True)
    return weight + torch.linalg.solve_triangular(upper.T, product, upper=False, left=True)


def linear_terms(weight: torch.Tensor, difference: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """2 Σ_j (W C)_j D_j, float64 `[n]`: with diag(D H Dᵀ), all of mean (W̃ x − W x̃)² that depends on W̃ = W − D.

    Args:
        weight, difference: `[k, n]`, transposed; with `cross` `[k, k]` in one order.
    """
    return 2 * (cross.T @ weight).mul_(difference).sum(0, dtype=torch.float64)
