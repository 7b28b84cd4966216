"""The layer loss and the second moment of the inputs that it is made of: L(W̃) = tr(D H Dᵀ), D = W − W̃, H = mean x xᵀ."""

from __future__ import annotations

import torch

ROWS = 1024  # of D that are multiplied at once


def second_moment(inputs: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """mean x xᵀ, float64 `[k, k]`, of `inputs` float `[tokens, k]`; with `others` of the same shape mean (x̃ − x) xᵀ.

    All tokens at once: for tests and small problems.
    """
    x = inputs.double()
    left = x if others is None else others.double() - x
    return left.T @ x / len(x)


def layer_loss(weight: torch.Tensor, dequantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H Dᵀ) with D = weight − dequantized: the mean squared error of the layer's output, summed over its rows.

    Args:
        weight, dequantized: `[n, k]`, any float type.
        hessian: mean x xᵀ, float32 or float64 `[k, k]`: the products are of its type, sums are float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=hessian.device)
    for w, q in zip(weight.split(ROWS), dequantized.split(ROWS), strict=True):
        difference = w.to(hessian.dtype) - q.to(hessian.dtype)
        total += (difference @ hessian).mul_(difference).sum(dtype=torch.float64)
    return total.item()


def check(hessian: torch.Tensor, k: int, name: str = "Hessian") -> None:
    """Refuse a matrix that is no mean of outer products of k inputs.

    Raises:
        ValueError: shape or type differ, an entry is NaN or infinite, or an entry of a Hessian's diagonal is negative.
    """
    if hessian.shape != (k, k) or hessian.dtype not in (torch.float32, torch.float64):
        expected = f"float32 or float64 [{k}, {k}], one row for each column of the weight"
        raise ValueError(f"the {name} is {str(hessian.dtype).removeprefix('torch.')} {list(hessian.shape)}, expected {expected}")
    low, high = torch.aminmax(hessian)  # NaN comes through both
    if not (torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(
            f"the {name} has NaN or infinite entries: an activation of the calibration run was, or its square overflowed; "
            "look for the first layer where this is so, and run the calibration in float32"
        )
    if name == "Hessian" and (hessian.diagonal() < 0).any():
        raise ValueError(f"the {name} has a negative diagonal entry ({low.item():.3g} is its least): it is no mean of x xᵀ")
