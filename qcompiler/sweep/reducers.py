"""Streaming statistics of activations: each sees all tokens once and keeps a fixed number of bytes."""

from __future__ import annotations

from typing import Protocol

import torch

from qcompiler.ops.experts_linear import rows_by_expert


class Reducer(Protocol):
    """Takes tokens as they come; `update` is a tap of `Segment.feed`."""

    def update(self, x: torch.Tensor) -> None:
        """Take `x` float32 `[tokens, k]`."""

    def result(self) -> torch.Tensor:
        """The statistic of everything seen."""


class AbsMax:
    """max |x_j| a channel: `[k]`."""

    def __init__(self, k: int):
        self._max = torch.zeros(k)

    def update(self, x: torch.Tensor) -> None:
        if x.shape[0]:
            torch.maximum(self._max, x.abs().amax(dim=0).to(self._max.dtype), out=self._max)

    def result(self) -> torch.Tensor:
        return self._max


class AbsMean:
    """mean |x_j| a channel over all tokens: `[k]`, summed in float64."""

    def __init__(self, k: int):
        self._sum = torch.zeros(k, dtype=torch.float64)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        self._sum += x.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        return (self._sum / max(self.tokens, 1)).float()


class Mean:
    """Mean a channel over all tokens: `[k]`, summed in float64."""

    def __init__(self, k: int):
        self._sum = torch.zeros(k, dtype=torch.float64)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        self._sum += x.sum(dim=0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        return self._sum / max(self.tokens, 1)


class Hessian:
    """H = E[x xᵀ] over all tokens: float32 `[k, k]`, a sum of float32 products a sample.

    Args:
        k: channels.
        dtype: float64 for tests and small layers.
    """

    def __init__(self, k: int, dtype: torch.dtype = torch.float32):
        self._sum = torch.zeros(k, k, dtype=dtype)
        self._done = False
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        x = x.to(self._sum.dtype)
        self._sum.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        """The mean, in the sum's own memory: no update may follow."""
        self._sum.div_(max(self.tokens, 1) if not self._done else 1)
        self._done = True
        return self._sum


class GuidedHessians:
    """H_g = E[s_g x xᵀ] for every group g of a layer's outputs: float32 `[k, k]` each (GuidedQuant, arXiv 2505.07004).

    Args:
        k: channels.
        groups: of the layer's outputs; each has a matrix.
        guide: s, float32 `[tokens of all samples, groups]`, not negative, of mean 1; `update` walks through its rows in order.
        dtype: float64 for tests and small layers.

    Raises:
        ValueError: the guide is of another number of groups or tokens.
    """

    def __init__(self, k: int, groups: int, guide: torch.Tensor, dtype: torch.dtype = torch.float32):
        if guide.dim() != 2 or guide.shape[1] != groups:
            raise ValueError(f"a guide of {groups} groups is [tokens, {groups}], found {list(guide.shape)}")
        self._guide = guide
        self._sums = [torch.zeros(k, k, dtype=dtype) for _ in range(groups)]
        self._done = False
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Take the next tokens `[tokens, k]`, in the order of the samples that the guide was made of."""
        weights = self._guide[self.tokens : self.tokens + x.shape[0]].to(x.device)
        if len(weights) != x.shape[0]:
            raise ValueError(f"a guide of {len(self._guide)} tokens, found more: it was made of other samples")
        x = x.to(self._sums[0].dtype)
        for index, total in enumerate(self._sums):
            # The root on both sides: the sum stays symmetric and positive semidefinite to the last bit.
            y = x * weights[:, index, None].to(x.dtype).sqrt()
            total.addmm_(y.T, y)
        self.tokens += x.shape[0]

    def result(self) -> list[torch.Tensor]:
        """The means, in the sums' own memory: no update may follow."""
        if self.tokens != len(self._guide):
            raise ValueError(f"a guide of {len(self._guide)} tokens, found {self.tokens}: it was made of other samples")
        for total in self._sums:
            total.div_(max(self.tokens, 1) if not self._done else 1)
        self._done = True
        return self._sums


class ExpertHessians:
    """H of every expert over the rows that are its own: `[experts]` of `Hessian`.

    Args:
        k: channels.
        experts: how many there are; one that no row meets keeps H = 0.
    """

    def __init__(self, k: int, experts: int):
        self._each = [Hessian(k) for _ in range(experts)]

    def update(self, x: torch.Tensor, expert: torch.Tensor) -> None:
        """Take `x` `[rows, k]` and the expert of each row, int64 `[rows]`."""
        for index, rows in rows_by_expert(expert.reshape(-1), len(self._each)):
            self._each[index].update(x[rows])

    @property
    def tokens(self) -> list[int]:
        """Rows that each expert met."""
        return [hessian.tokens for hessian in self._each]

    def result(self, expert: int) -> torch.Tensor:
        """The mean of one expert; `[k, k]`."""
        return self._each[expert].result()


class Cross:
    """C = E[(x̃ − x) xᵀ], x̃ the float stream's input and x the quantized one's: `[k, k]` (GPTAQ, arXiv 2504.02692)."""

    def __init__(self, k: int, dtype: torch.dtype = torch.float32):
        self._sum = torch.zeros(k, k, dtype=dtype)
        self._done = False
        self.tokens = 0

    def update(self, x: torch.Tensor, x_float: torch.Tensor) -> None:
        x, x_float = x.to(self._sum.dtype), x_float.to(self._sum.dtype)
        self._sum.addmm_((x_float - x).T, x)
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        """The mean, in the sum's own memory: no update may follow."""
        self._sum.div_(max(self.tokens, 1) if not self._done else 1)
        self._done = True
        return self._sum


class Reservoir:
    """A uniform sample of `size` tokens of all that were seen (Vitter's algorithm R), the same for the same seed.

    Args:
        k: channels.
        size: tokens kept at most.
        seed: of the draw.
    """

    def __init__(self, k: int, size: int, seed: int = 0):
        self._rows = torch.empty(size, k)
        self._generator = torch.Generator("cpu").manual_seed(seed)  # the same draws on every device
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        size = self._rows.shape[0]
        fill = min(max(size - self.tokens, 0), x.shape[0])
        if fill:
            self._rows[self.tokens : self.tokens + fill] = x[:fill]
        rest = x.shape[0] - fill
        if rest:
            # token number t (from 1) replaces a row with probability size / t
            numbers = torch.arange(self.tokens + fill + 1, self.tokens + x.shape[0] + 1, dtype=torch.float64, device="cpu")
            drawn = (torch.rand(rest, generator=self._generator, dtype=torch.float64, device="cpu") * numbers).long()
            for index in torch.nonzero(drawn < size).flatten().tolist():
                self._rows[drawn[index]] = x[fill + index]
        self.tokens += x.shape[0]

    def result(self) -> torch.Tensor:
        return self._rows[: min(self.tokens, self._rows.shape[0])]
