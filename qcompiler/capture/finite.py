"""Weights that are no numbers, found before anything is computed with them."""

from __future__ import annotations

import torch

from qcompiler.errors import InputError


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise `InputError` naming the first parameter of `model` that holds NaN or infinity; `where` it comes from.

    Buffers are left alone: a mask may well hold infinities.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        # NaN travels through minimum and maximum, so nothing of the weight's size is allocated.
        low, high = torch.aminmax(parameter.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            kind = "NaN" if torch.isnan(low) or torch.isnan(high) else "infinity"
            raise InputError(f"{where}: weight {name} holds {kind}; quantizing it would spread it over the layer")
