"""Sums of numbers by cluster, with the same bits in every run on every device.

`scatter_add_`, `index_add_` and `bincount` with weights add in no fixed order on a GPU: the last bits of codebooks, and with them
now and then an index, would change from one compile to the next. There the numbers are sorted by cluster once, and each cluster
is summed by itself; on the CPU these ops go through the numbers in order.
"""

from __future__ import annotations

import torch


class Clusters:
    """Which of `count` sums each number is part of.

    Args:
        index: int64 `[N]`, in `[0, count)`.
    """

    def __init__(self, index: torch.Tensor, count: int) -> None:
        self._index, self._count = index, count
        self._order = self._sizes = None
        if index.device.type != "cpu":
            self._order = index.to(torch.int32).argsort(stable=True)  # half the bytes to sort
            self._sizes = torch.bincount(index, minlength=count)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Of `values` `[N]`: `[count]`, 0 where there is none."""
        if self._order is None:
            return torch.bincount(self._index, values, self._count)
        ordered = values.index_select(0, self._order)
        return torch.segment_reduce(ordered, "sum", lengths=self._sizes, unsafe=True, initial=0)


def cumulative(values: torch.Tensor) -> torch.Tensor:
    """`values` `[G, N]` summed up along their rows; a single row alone has no fixed order of sums on a GPU."""
    if values.device.type == "cpu" or len(values) != 1:
        return values.cumsum(1)
    return values.expand(2, -1).cumsum(1)[:1]
