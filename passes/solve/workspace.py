"""What the solvers of single layers hold on a device while they solve one matrix, where all of its rows are solved at once.

On a CPU rows go through in pieces that are small beside the statistics; there is `SQUARES` and `WEIGHTS` of each pass. The
numbers of copies here are those that `tests/sweep/test_room.py` counts, storage by storage, rounded up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompiler.numerics.codebook import ELSEWHERE
from qcompiler.numerics.gptq import ROWS_ELSEWHERE
from qcompiler.numerics.vq_plan import FIXED_WIDTH
from qcompiler.ops.formats import AffineFormat

if TYPE_CHECKING:
    from qcompiler.ops.formats import VqFormat

# Of k × k in float32: the factor and what it is made of; the cross statistic, its products.
SQUARES, CROSS_SQUARES = 3, 3
# Of n × k: the columns, their errors, what the sweep saw, grids and codes of both passes; a target of its own.
GPTQ_WEIGHTS, CROSS_WEIGHTS = 11, 1
# The same; and of the n × block at work: features of its points, sums and tables of codebooks.
GPTVQ_WEIGHTS, BLOCK_WEIGHTS, VQ_SQUARES = 7, 18, 2
# Codebooks of a weight alone need no factor.
NEAREST_WEIGHTS, NEAREST_BLOCK = 6, 20
# Of n × k while it is rounded to integers, and while its error is measured: ranges, turned groups; codes in float, their grids.
ROUNDED_WEIGHTS = 8


def gptq_bytes(n: int, k: int, cross: bool = False, parts: int = 1) -> int:
    """Bytes that `gptq` holds beside its H (and C) while it solves `[n, k]`, with the float weight.

    Args:
        n, k: rows and columns.
        cross: whether there is C.
        parts: of the rows, each solved by its own H.
    """
    rows = min(-(-n // parts), ROWS_ELSEWHERE)
    squares, weights = SQUARES + CROSS_SQUARES * cross, GPTQ_WEIGHTS + CROSS_WEIGHTS * cross
    return 4 * (squares * k * k + weights * rows * k + n * k + _stacked(k, parts))


def gptvq_bytes(n: int, k: int, format: VqFormat, cross: bool = False, parts: int = 1) -> int:
    """The same of `gptvq`, with the errors of a block's points and all entries."""
    rows = min(-(-n // parts), ROWS_ELSEWHERE)
    block, errors = _block(rows, k, format)
    squares, weights = VQ_SQUARES + CROSS_SQUARES * cross, GPTVQ_WEIGHTS + CROSS_WEIGHTS * cross
    return 4 * (squares * k * k + weights * rows * k + BLOCK_WEIGHTS * block + errors + n * k + _stacked(k, parts))


def nearest_bytes(n: int, k: int, format: AffineFormat | VqFormat) -> int:
    """Bytes while `[n, k]` is rounded to nearest, with the float weight and its codes."""
    if isinstance(format, AffineFormat):
        return 4 * ROUNDED_WEIGHTS * n * k
    rows = min(n, ROWS_ELSEWHERE)
    block, errors = _block(rows, k, format)
    return 4 * (NEAREST_WEIGHTS * rows * k + NEAREST_BLOCK * block + errors + n * k)


def _block(rows: int, k: int, format: VqFormat) -> tuple[int, int]:
    """Weights of a block of columns, and the errors of its points and all entries that are held at once."""
    block = rows * min(format.block_columns or max(FIXED_WIDTH, format.group), k)
    return block, min(block // format.dim * format.centroids, ELSEWHERE)


def _stacked(k: int, parts: int) -> int:
    """Numbers of several H while they are put side by side."""
    return parts * k * k if parts > 1 else 0
