"""GPTVQ: vector-quantized weights that keep the layer's output, tr(D H Dᵀ) with D = W − W̃.

After "GPTVQ: the blessing of dimensionality for LLM quantization" (arXiv 2402.15319).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.numerics.damping import LARGEST
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import VqFormat


@dataclass(frozen=True)
class GptvqOptions:
    """How to solve.

    Attributes:
        mode: `exact`; `official`: the behaviour of the authors' program, to compare with.
        damping: what is added to diag(H), as a share of its mean; ten times more, at most 1, until a factor exists.
        floor: diagonal entries below this share of the mean are lifted to it.
        iterations: of EM for a codebook, at most.
        tolerance: EM ends when an iteration takes less than this share off the error.
        seeding: of EM: `mahalanobis`: points at equal ranks of their distance from the mean; `k-means++`.
        rounds: of {codebooks, scales, assignments} in a block of columns when the sweep reaches it.
        passes: over all columns after the sweep, with the same rounds in each block.
        steps: of conjugate gradients for a block's codebooks.
        ordering: in which order blocks of columns, and vectors in a block, are visited: `activation`: by their largest
            diag(H); `none`.
        compare: also take the codebooks of the weight alone, with each vector its nearest entry, and keep that where it
            has the lower loss.
        dtype: of the sweep.
    """

    mode: Literal["exact", "official"] = "exact"
    damping: float = 0.01
    floor: float = 1e-6
    iterations: int = 100
    tolerance: float = 1e-3
    seeding: Literal["mahalanobis", "k-means++"] = "mahalanobis"
    rounds: int = 2
    passes: int = 1
    steps: int = 8
    ordering: Literal["none", "activation"] = "activation"
    compare: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        allowed = {
            "mode": ("exact", "official"), "seeding": ("mahalanobis", "k-means++"), "ordering": ("none", "activation"),
            "dtype": (torch.float32, torch.float64),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                expected = ", ".join(map(repr, values))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name, least in (("iterations", 1), ("rounds", 0), ("passes", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.damping <= LARGEST or not 0 <= self.floor <= 1:
            raise ValueError(f"damping is {self.damping:g} and floor {self.floor:g}, expected shares of the mean, 0 to 1")


@dataclass(frozen=True)
class GptvqResult:
    """A solved layer.

    Attributes:
        weight: as it is stored.
        loss_before: tr(D H Dᵀ) of `vq_nearest`, the same format without H; None where it was not compared. With cross
            statistics the part of mean ‖W̃ x − W x̃‖² that depends on W̃, which may be negative.
        loss_after: the same of `weight.dequantize()`.
        damping: what was used, as a share of the mean of diag(H); the largest of several Hessians.
        attempts: factorisations that it took, of all Hessians.
        dead: columns that no calibration input excites.
        fallback: why `weight` is that of `vq_nearest` after all, or None. A caller reports it.
    """

    weight: VqWeight
    loss_before: float | None
    loss_after: float
    damping: float
    attempts: int
    dead: int
    fallback: str | None = None


@torch.no_grad()
def gptvq(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    format: VqFormat,
    options: GptvqOptions = GptvqOptions(),
    *,
    cross: torch.Tensor | None = None,
    row_hessians: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    seed: int = 0,
) -> GptvqResult:
    """Quantize one weight.

    Args:
        weight: float `[n, k]`, finite.
        hessian: mean x xᵀ of the layer's inputs, float32 or float64 `[k, k]`, symmetric, on the device of `weight`. May be
            None where `row_hessians` are given.
        format: of the result.
        cross: mean (x̃ − x) xᵀ `[k, k]`, x̃ the input of the float model: the loss is then that of W̃ x against W x̃.
        row_hessians: `[parts, k, k]`: part i of the rows, which are cut into equal parts of whole codebooks, has its own.
        table: float `[centroids, dim]`: fixed entries of all codebooks; only scales and indices are solved for.
        seed: of k-means++ and of nothing else.

    Raises:
        ValueError: NaN or infinite entries, shapes that do not fit, more centroids than a block has vectors, or a range
            that float16 scales cannot hold.
    """
    raise NotImplementedError
