"""In which order a sweep visits the columns of a weight, and in which blocks. The order changes no stored layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PIECE = 16  # columns whose errors are fed forward together inside a block


@dataclass(frozen=True)
class Block:
    """Columns that are swept together, positions in the order of the sweep.

    Attributes:
        start, stop: the block.
        pieces: consecutive `(first, last)` that cover it. A group that is fitted on the way begins at a `first`.
    """

    start: int
    stop: int
    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Order:
    """A sweep's plan.

    Attributes:
        permutation: int64 `[k]`, position -> column; None where they are equal.
        group: position -> group of the format.
        begins: first position of a group -> the position after its last; empty where groups are scattered, or one is all.
        blocks: of the sweep.
    """

    permutation: torch.Tensor | None
    group: list[int]
    begins: dict[int, int]
    blocks: list[Block]


def order_columns(diagonal: torch.Tensor, kind: str, width: int, block: int) -> Order:
    """Plan a sweep.

    Args:
        diagonal: diag(H) `[k]`.
        kind: `none`; `activation`: by diag(H), largest first; `group_aware`: groups by their largest diag(H), and the
            columns inside each by diag(H), largest first (arXiv 2505.14638). Ties keep their order.
        width: columns of a group, the last group may have fewer; 0 for all.
        block: columns of a block at most. Groups are not cut: a block holds one group at least.

    Raises:
        ValueError: an unknown kind.
    """
    k = len(diagonal)
    width = width or k
    if kind == "none":
        permutation = None
    elif kind == "activation":
        permutation = torch.argsort(diagonal, descending=True, stable=True)
    elif kind == "group_aware":
        permutation = _by_group(diagonal, width)
    else:
        raise ValueError(f"ordering must be 'none', 'activation' or 'group_aware', got {kind!r}")
    columns = range(k) if permutation is None else permutation.tolist()
    group = [column // width for column in columns]
    if width >= k or kind == "activation":  # every grid is known before the first column: blocks may cut a group
        return Order(permutation, group, {}, [_block(i, min(i + block, k), []) for i in range(0, k, block)])
    firsts = [0] + [i for i in range(1, k) if group[i] != group[i - 1]]
    begins = dict(zip(firsts, firsts[1:] + [k], strict=True))
    blocks: list[Block] = []
    start = 0
    inside: list[int] = []
    for first, last in begins.items():
        if inside and last - start > block:
            blocks.append(_block(start, first, inside))
            start, inside = first, []
        inside.append(first)
    blocks.append(_block(start, k, inside))
    return Order(permutation, group, begins, blocks)


def _by_group(diagonal: torch.Tensor, width: int) -> torch.Tensor:
    k = len(diagonal)
    groups = -(-k // width)
    padded = torch.full((groups * width,), -torch.inf, dtype=diagonal.dtype, device=diagonal.device)
    padded[:k] = diagonal
    padded = padded.view(groups, width)
    inside = torch.argsort(padded, dim=1, descending=True, stable=True)
    rank = torch.argsort(padded.amax(dim=1), descending=True, stable=True)
    columns = (torch.arange(groups, device=diagonal.device)[:, None] * width + inside)[rank].view(-1)
    return columns[columns < k]


def _block(start: int, stop: int, firsts: list[int]) -> Block:
    """A block, cut into pieces at `firsts` and every `PIECE` columns after each."""
    firsts = firsts or [start]
    pieces = [
        (i, min(i + PIECE, end))
        for first, end in zip(firsts, firsts[1:] + [stop], strict=True)
        for i in range(first, end, PIECE)
    ]
    return Block(start, stop, tuple(pieces))
