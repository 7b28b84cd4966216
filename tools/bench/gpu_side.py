"""What is compared on a GPU: a side is a kernel in a format that is given several matrices of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tools.bench.kernels_side import TOLERANCE, Skipped, relative_error

__all__ = ["TOLERANCE", "GpuCase", "GpuSide", "Opened", "Skipped", "several"]

CHECKED = 128  # outputs that are compared with the float product


@dataclass(frozen=True)
class GpuCase:
    """y[rows, n] = x[rows, k] · Wᵀ on `device`."""

    n: int
    k: int
    rows: int
    device: torch.device

    @property
    def title(self) -> str:
        """`4096 x 14336, 16 rows`."""
        return f"{self.n} x {self.k}, {self.rows} row{'s' * (self.rows > 1)}"

    def x(self, dtype: torch.dtype) -> torch.Tensor:
        """The activations `[rows, k]`: normal, the same in every side but for their rounding."""
        generator = torch.Generator(self.device).manual_seed(7)
        return torch.randn(self.rows, self.k, generator=generator, device=self.device).to(dtype)

    def generator(self) -> torch.Generator:
        """Of the weights."""
        return torch.Generator(self.device).manual_seed(8)


@dataclass
class Opened:
    """A side that is ready.

    Attributes:
        calls: a product each, with a matrix of its own each.
        matrix_bytes: of one matrix, as stored.
        product: result of the first matrix, float32 `[rows, some outputs]`, and the float product of its dequantized weights.
        about: what else the report keeps, for instance the kernel that was chosen.
    """

    calls: Sequence[Callable[[], Any]]
    matrix_bytes: int
    product: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    about: dict[str, Any] = field(default_factory=dict)

    def error(self) -> float:
        """Relative error of the product."""
        found, expected = (value.float().cpu().numpy() for value in self.product())
        return relative_error(found, expected)


class GpuSide(Protocol):
    """A kernel in a format. `family`: `ours` or the program that it belongs to; `name` is unique in a run."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        """Raises `Skipped` where it cannot run. `matrices(bytes of one)`: how many it is given."""
        ...


def several(first: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    """The same matrix in memory of its own, `count` times: making each anew would take longer than measuring."""
    copy = lambda part: part.clone() if isinstance(part, torch.Tensor) else part  # noqa: E731
    return [first, *(tuple(copy(part) for part in first) for _ in range(count - 1))]
