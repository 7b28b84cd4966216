"""A quantized product that gradients pass through: rounding counts as the identity (straight-through estimator)."""

from __future__ import annotations

import torch
from torch.nn import functional

from qcompiler.numerics.affine import AffineWeight
from qcompiler.ops.formats import ACTIVATION_BLOCK, Activation, AffineFormat


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round half to even; the gradient is 1."""
    return x + (torch.round(x) - x).detach()


def latent_range(format: AffineFormat) -> tuple[int, int]:
    """The least and the largest code that a latent weight is rounded to: −128 is left out where codes are symmetric."""
    low, high = format.code_range
    return (-127, high) if format.bits == 8 and format.symmetric else (low, high)


def fake_activations(x: torch.Tensor, activation: Activation, static: tuple[float, int] | None = None) -> torch.Tensor:
    """x̃ as the kernels see it; gradients pass where nothing is clamped.

    Args:
        x: `[..., k]`.
        activation: of the op.
        static: scale and zero point of static activations.
    """
    if activation is Activation.FLOAT:
        return x
    if static is not None:
        step, zero = static
        return step * (round_through(x / step + zero).clamp(-128, 127) - zero)
    k = x.shape[-1]
    width = k if activation is Activation.INT8_TOKEN else ACTIVATION_BLOCK
    padded = functional.pad(x, (0, -k % width)).unflatten(-1, (-1, width))
    scale = padded.detach().abs().amax(dim=-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (round_through(padded / scale).clamp(-127, 127) * scale).flatten(-2)[..., :k]


class FakeLinear:
    """Stands for a site's product while its weight is tuned.

    Args:
        weight: the float weight `[n, k]`.
        solution: where to start: its scales and zero points. A latent weight starts at the float one, moved into the cell
            that its code has in the solution.
        activation: what the site's activations become.
        static: of static activations.

    Attributes:
        latent: what is rounded, in units of the weight.
        log_scale: log |S'| / |S|, `[n, groups]`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        solution: AffineWeight,
        activation: Activation,
        static: tuple[float, int] | None = None,
    ):
        self._solution, self._activation, self._static = solution, activation, static
        self._scales = solution.scales.float()
        width = solution.format.group or weight.shape[1]
        self._spread = lambda t: t.repeat_interleave(width, dim=1)[:, : weight.shape[1]]
        zeros = solution.zeros
        self._centre = float(solution.format.center) if zeros is None else self._spread(zeros.float())
        scale = self._spread(self._scales)
        codes = solution.codes.float() - self._centre
        # Just inside the cell: a solver may have chosen another code than the nearest.
        start = torch.clamp(weight / scale, codes - 0.499, codes + 0.499)
        low, high = latent_range(solution.format)
        saturated = (codes <= low - self._centre) | (codes >= high - self._centre)
        self.latent = torch.where(saturated, codes, start).mul_(scale).requires_grad_()
        self.log_scale = torch.zeros_like(self._scales).requires_grad_()

    def step_size(self) -> float:
        """The median magnitude of a scale: a weight that moves this far changes its code."""
        return float(self._scales.abs().median())

    def _levels(self, scale: torch.Tensor) -> torch.Tensor:
        low, high = latent_range(self._solution.format)
        return (round_through(self.latent / scale) + self._centre).clamp(low, high) - self._centre

    def weight(self) -> torch.Tensor:
        """W̃ = S' · (q' − Z), differentiable in the latent weight and the scale."""
        scale = self._spread(self._scales * self.log_scale.exp())
        return self._levels(scale) * scale

    def __call__(self, x: torch.Tensor, weight: None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(fake_activations(x, self._activation, self._static), self.weight(), bias)

    def solution(self) -> AffineWeight:
        """What it has come to: codes of the latent weight on the tuned grid, scales in float16."""
        with torch.no_grad():
            half = (self._scales * self.log_scale.exp()).half()
            codes = self._levels(self._spread(half.float())) + self._centre
        held = self._solution
        return AffineWeight(codes.to(held.codes.dtype), half, held.zeros, held.format)
