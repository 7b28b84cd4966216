"""In which order a sweep visits the vectors of a weight, and in which blocks. The order changes no stored layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.numerics.vq_shape import VqShape

FIXED_WIDTH = 128  # columns of a block where the codebook is fixed: no format limits it


@dataclass(frozen=True)
class Span:
    """A block of the sweep: positions `start` to `stop`.

    Attributes:
        across: its codebook among those of a row.
        groups: of scales that its columns have, ascending; `group`: of each of its vectors, positions in `groups`.
        real: `[stop - start, 1]`, 0 for padding; None where there is none.
    """

    start: int
    stop: int
    across: int
    groups: list[int]
    group: list[int]
    real: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """Which column is where.

    Attributes:
        permutation: int64 `[k']`, position -> column; columns from k on are padding.
        vectors: int64 `[k' / d]`, position -> natural vector.
        spans: blocks in the order of the sweep.
    """

    permutation: torch.Tensor
    vectors: torch.Tensor
    spans: list[Span]


def plan(diagonal: torch.Tensor, shape: VqShape, ordering: str, fixed: bool) -> Plan:
    """Plan a sweep: blocks by their largest diag(H), and the vectors of a block too; or all in their order with `none`.

    Args:
        diagonal: diag(H) `[k]`.
        fixed: the codebook is given, and a block need not have one of its own.
    """
    k, device = len(diagonal), diagonal.device
    members = shape.members(k).to(device)
    first = members[:, 0]
    width = shape.columns or (k if not fixed else max(FIXED_WIDTH, shape.group))
    block = first // width
    score = torch.where(members < k, diagonal[members.clamp(max=k - 1)], -torch.inf).amax(1)
    if ordering == "none":
        vectors = torch.arange(len(members), device=device)
    else:
        largest = score.new_full((int(block.max()) + 1,), -torch.inf).scatter_reduce(0, block, score, "amax")
        vectors = torch.argsort(score, descending=True, stable=True)
        vectors = vectors[torch.argsort(block[vectors], stable=True)]
        rank = torch.argsort(torch.argsort(largest, descending=True, stable=True))
        vectors = vectors[torch.argsort(rank[block[vectors]], stable=True)]
    columns = members[vectors]
    own = (first[vectors] // shape.group if shape.group else torch.zeros_like(vectors)).tolist()
    blocks = block[vectors].tolist()
    edges = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1]] + [len(blocks)]
    spans = []
    for begin, end in zip(edges, edges[1:], strict=False):
        groups = sorted(set(own[begin:end]))
        real = (columns[begin:end] < k).view(-1, 1)
        spans.append(
            Span(
                begin * shape.dim, end * shape.dim, blocks[begin] if shape.columns else 0, groups,
                [groups.index(group) for group in own[begin:end]], None if bool(real.all()) else real,
            )
        )  # fmt: skip
    return Plan(columns.reshape(-1), vectors, spans)
