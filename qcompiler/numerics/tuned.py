"""Quantized matrices whose scales and codebooks, and codes if that is asked for, are tuned by gradients.

    affine   W̃ = S' · (q' − Z)                   S' = fp16(S · exp θ), q' = q or round(L)
    vector   W̃ = S' · c' · round(C')[index]      c' = fp16(c · exp φ)

The forward value is that of the stored form, rounding counts as the identity (straight-through estimator). A product keeps its
input alone: the dense matrix is made again on the way back and its gradient reduced at once to those of the few parameters.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.straight_through import fake_activations, latent_range
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import Activation

LARGEST = 65504.0
# Matrices of n × k float32 beside a product's inputs: the dense one, its gradient, and two on the way to the parameters' own.
MATRICES = 4


class Tuned(Protocol):
    """A matrix `[n, k]` with parameters.

    Attributes:
        parameters: by kind: `scales` (relative, θ), `codes` (in codes, L), `codebook_scales` (relative, φ), `codebooks` (in int8
            steps, C').
    """

    parameters: dict[str, torch.Tensor]

    def weight(self) -> torch.Tensor:
        """W̃ float32 `[n, k]`, as it would be stored."""

    def gradients(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """∂l/∂parameter of each, in the order of `parameters`, from ∂l/∂W̃ `[n, k]`, which may be overwritten."""

    def solution(self) -> Any:
        """The stored form of what it has come to."""


class TunedAffine:
    """An affine matrix, its scales tuned. `parameters["scales"]` is θ `[n, groups]`.

    Args:
        solution: where to start.
        weight: float32 `[n, k]`; if given, codes are tuned too, in the manner of quantization-aware training:
            `parameters["codes"]` is L `[n, k]`, in codes, and begins where the weight lies in the cell of its code.
    """

    def __init__(self, solution: AffineWeight, weight: torch.Tensor | None = None):
        self._held = solution
        self.parameters = {"scales": torch.zeros(solution.scales.shape).requires_grad_()}
        if weight is None:
            return
        self._low, self._high = latent_range(solution.format)
        at = weight / self._spread(solution.scales.float()) + self._centre()
        codes = solution.codes.float()
        # Just inside the cell: a solver may have chosen another code than the nearest.
        inside = torch.where(at.isfinite(), at, codes).clamp(codes - 0.499, codes + 0.499)
        self.parameters["codes"] = inside.clamp(self._low, self._high).requires_grad_()

    def solution(self) -> AffineWeight:
        held = self._held
        return AffineWeight(self._codes(), _scaled(held.scales, self.parameters["scales"]), held.zeros, held.format)

    def weight(self) -> torch.Tensor:
        return self.solution().dequantize()

    def gradients(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        now = self.solution()
        if "codes" not in self.parameters:
            return [group_sums(gradient.mul_(now.dequantize()), now.format.group)]
        latent = self.parameters["codes"].detach()
        # What is clipped at an end of the range does not move beyond it.
        to_codes = gradient * self._spread(now.scales.float()) * ((latent >= self._low) & (latent <= self._high))
        return [group_sums(gradient.mul_(now.dequantize()), now.format.group), to_codes]

    def _codes(self) -> torch.Tensor:
        held = self._held.codes
        if "codes" not in self.parameters:
            return held
        return self.parameters["codes"].detach().round().clamp(self._low, self._high).to(held.dtype)

    def _centre(self) -> torch.Tensor | float:
        zeros = self._held.zeros
        return float(self._held.format.center) if zeros is None else self._spread(zeros.float())

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, groups]` to `[n, k]`."""
        k = self._held.codes.shape[1]
        return x.repeat_interleave(self._held.format.group or k, dim=1)[:, :k]


class TunedVq:
    """A vector-quantized matrix: scales, and its codebooks and their scales unless the format's table is fixed."""

    def __init__(self, solution: VqWeight, fixed: bool = False):
        self._held = solution
        self.parameters = {"scales": torch.zeros(solution.scales.shape).requires_grad_()}
        if not fixed:
            self.parameters["codebook_scales"] = torch.zeros(solution.codebook_scales.shape).requires_grad_()
            self.parameters["codebooks"] = solution.codebooks.float().requires_grad_()
        self._flat: torch.Tensor | None = None

    def solution(self) -> VqWeight:
        held, given = self._held, self.parameters
        scales = _scaled(held.scales, given["scales"])
        if "codebooks" not in given:
            return VqWeight(held.indices, held.codebooks, held.codebook_scales, scales, held.columns, held.format)
        codebooks = given["codebooks"].detach().round().clamp(-128, 127).to(torch.int8)
        shared = _scaled(held.codebook_scales, given["codebook_scales"])
        return VqWeight(held.indices, codebooks, shared, scales, held.columns, held.format)

    def weight(self) -> torch.Tensor:
        return self.solution().dequantize()

    def gradients(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        now, format = self.solution(), self._held.format
        scaled = gradient.mul_(now.factors())  # ∂l/∂C[index] of every weight
        entries = None if "codebooks" not in self.parameters else self._to_entries(scaled)
        own = scaled.mul_(now.levels())  # ∂l/∂W̃ · W̃
        found = [group_sums(own, format.group)]
        if entries is not None:
            across = group_sums(own, format.block_columns)
            found += [group_sums(across.T, format.block_rows).T.contiguous(), entries]
        return found

    def _to_entries(self, gradient: torch.Tensor) -> torch.Tensor:
        """Sum `[n, k]` over the vectors that hold each entry: `[blocks down, blocks across, centroids, dim]`."""
        held, f = self._held, self._held.format
        n, vectors = held.indices.shape
        padded = functional.pad(gradient, (0, vectors * f.dim - held.columns))
        rows = padded.view(n, vectors // 4, f.dim, 4).permute(2, 0, 1, 3).reshape(f.dim, -1)
        count = held.codebooks.numel() // f.dim
        sums = [torch.bincount(self._places(), own, minlength=count) for own in rows]
        total = torch.stack(sums, dim=1).float().view(held.codebooks.shape)
        # What is clipped at an end of the int8 range does not move beyond it.
        latent = self.parameters["codebooks"].detach()
        return total * ((latent >= -128) & (latent <= 127))

    def _places(self) -> torch.Tensor:
        """Of every vector the row of its entry among those of all codebooks, int32 `[n · vectors]`."""
        held, f = self._held, self._held.format
        if self._flat is None:
            n, vectors = held.indices.shape
            # Gradients are computed in a thread of their own, which knows of no device that others made the default.
            place = held.indices.device
            row = torch.arange(n, device=place)
            down = row // f.block_rows if f.block_rows else torch.zeros_like(row)
            block = torch.arange(vectors, device=place) // 4 * f.span
            across = block // f.block_columns if f.block_columns else torch.zeros_like(block)
            book = down[:, None] * held.codebooks.shape[1] + across
            self._flat = (book * f.centroids + held.indices).to(torch.int32).flatten()
        return self._flat


class Fixed:
    """A quantized matrix that nothing is tuned of; gradients pass through its product."""

    def __init__(self, solution: AffineWeight | VqWeight):
        self._held = solution
        self.parameters: dict[str, torch.Tensor] = {}

    def solution(self) -> AffineWeight | VqWeight:
        return self._held

    def weight(self) -> torch.Tensor:
        return self._held.dequantize()

    def gradients(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        return []


class TunedLinear:
    """Stands for a site's product while its matrix is tuned.

    Args:
        matrix: what is tuned.
        activation, static: of the site's input (see `fake_activations`).
        keep: hold the dense matrix until `forget`, instead of making it for every product.
    """

    def __init__(
        self, matrix: Tuned, activation: Activation, static: tuple[float, int] | None = None, keep: bool = True
    ):
        self.matrix, self._activation, self._static, self._keep = matrix, activation, static, keep
        self._dense: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """W̃, no part of any graph of gradients."""
        if self._dense is not None:
            return self._dense
        with torch.no_grad():
            dense = self.matrix.weight()
        if self._keep:
            self._dense = dense
        return dense

    def forget(self) -> None:
        """The parameters have changed."""
        self._dense = None

    def __call__(self, x: torch.Tensor, weight: None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen = fake_activations(x, self._activation, self._static)
        return _Product.apply(seen, bias, self, *self.matrix.parameters.values())


class TunedLookup:
    """Stands for a lookup in a matrix that is tuned: rows of W̃, float32 `[…, k]`."""

    def __init__(self, linear: TunedLinear):
        """`linear`: the product of the same matrix, which holds W̃ for both."""
        self._linear = linear

    def __call__(self, weight: None, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return _Lookup.apply(ids, self._linear, *self._linear.matrix.parameters.values())


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, linear: TunedLinear, *_: torch.Tensor) -> torch.Tensor:
        ctx.linear = linear
        ctx.save_for_backward(ids)
        return functional.embedding(ids, linear.weight())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        linear = ctx.linear
        to_weight = torch.zeros_like(linear.weight())
        to_weight.index_add_(0, ids.flatten(), gradient.flatten(0, -2))
        return None, None, *linear.matrix.gradients(to_weight)


class _Product(torch.autograd.Function):
    """x W̃ᵀ + bias; on the way back W̃ is made once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, product: TunedLinear, *_: torch.Tensor) -> torch.Tensor:
        ctx.product = product
        ctx.save_for_backward(x)
        return functional.linear(x, product.weight(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        product = ctx.product
        to_x = gradient @ product.weight() if ctx.needs_input_grad[0] else None
        parameters: list[torch.Tensor | None] = [None] * len(product.matrix.parameters)
        if any(ctx.needs_input_grad[3:]):
            to_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            parameters[:] = product.matrix.gradients(to_weight)
        return to_x, None, None, *parameters


def group_sums(x: torch.Tensor, width: int) -> torch.Tensor:
    """Sums over `width` consecutive columns, the last group may be short: `[n, groups]`; 0 is the whole row."""
    width = width or x.shape[1]
    return functional.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width)).sum(dim=2)


def _scaled(scales: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """S · exp θ as float16, finite."""
    moved = scales.float() * log.detach().exp()
    return moved.clamp(-LARGEST, LARGEST).half()
