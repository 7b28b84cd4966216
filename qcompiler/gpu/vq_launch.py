"""Launches of the kernels of vector-quantized weights: which sizes a configuration may have, and what a launch allocates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from triton import cdiv

from qcompiler.gpu import device, memory, vq_kernels
from qcompiler.ops import vq_layout
from qcompiler.ops.formats import ACTIVATION_BLOCK, TILE, VqFormat

# A table of pairs is made where it takes at most this part of the memory of the indices.
PAIRS_SHARE = 1 / 4


@dataclass(frozen=True)
class Weight:
    """A packed weight `[n, k]` on a device: the four tensors of docs/layout.md as they are stored.

    Attributes:
        format: as the kernels read it, which `in_pairs` changes.
        paired: whether an index of the format is two indices of the codebooks.
    """

    codes: torch.Tensor
    codebooks: torch.Tensor
    codebook_scales: torch.Tensor
    scales: torch.Tensor
    format: VqFormat
    n: int
    k: int
    paired: bool = False

    def checked(self, op: str, where: torch.device) -> Weight:
        """Itself. The kernels read the tensors without a look at their sizes.

        Raises:
            RuntimeError: types, shapes, order in memory or a device that do not fit.
        """
        n, k, format = self.n, self.k, self.format
        for name, tensor, dtype, shape in (
            ("codes", self.codes, torch.uint8, vq_layout.codes_shape(n, k, format)),
            ("codebooks", self.codebooks, torch.int8, vq_layout.codebooks_shape(n, k, format)),
            ("codebook_scales", self.codebook_scales, torch.float16, format.blocks(n, k)),
            ("scales", self.scales, torch.float16, vq_layout.scales_shape(n, k, format)),
        ):
            torch._check(
                tensor.dtype == dtype and tensor.shape == shape and tensor.device == where and tensor.is_contiguous(),
                lambda name=name, t=tensor, d=dtype, s=shape: f"{op}: {name} are {t.dtype} {list(t.shape)} on {t.device}, "
                f"expected {d} {list(s)} on {where}, contiguous",
            )
        return self

    @cached_property
    def words(self) -> torch.Tensor:
        """`codes` as int32: a word is the four bytes of a row in a vector of 64."""
        return self.codes.view(torch.int32)

    @property
    def segment(self) -> int:
        """Columns that share S and c."""
        return self.format.group or ACTIVATION_BLOCK

    def in_pairs(self, dtype: torch.dtype) -> Weight:
        """The weight with two scalar entries to a look-up, where a table of pairs is worth its memory; else itself.

        Two indices of a row that lie side by side in a byte, or in the six bits of I_f and I_f+1, are of columns at distance 4,
        as the two numbers of a vector are: the bytes of scalar indices of b bits are those of indices of 2b bits to vectors of
        two, whose codebook has all pairs of entries.

        Args:
            dtype: as of `tensors`.
        """
        format = self.format
        if format.dim != 1 or self.paired:
            return self
        pairs = replace(format, dim=2, centroids=format.centroids**2)
        books = self.codebooks.shape[0] * self.codebooks.shape[1]
        if books * pairs.centroids * 2 * _numbers(dtype).itemsize > PAIRS_SHARE * self.codes.numel():
            return self
        return replace(self, format=pairs, paired=True)

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What the kernels read, the entries as numbers of this type where it has 16 bits, else as int8."""
        return self.words, entry_words(self.codebooks, dtype, self.paired), self.codebook_scales, self.scales

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Units of a tile, groups of a row, codebooks across."""
        return self.codes.shape[1], self.format.groups(self.k), self.codebooks.shape[1]

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        format = self.format
        return {
            "DIM": format.dim, "CENTROIDS": format.centroids, "INDEX_BITS": format.index_bits,
            "BLOCK_ROWS": format.block_rows, "BLOCK_COLUMNS": format.block_columns, "GROUP": format.group,
        }  # fmt: skip

    def one_book(self, block_n: int) -> bool:
        """Whether the codebook is the same for aligned tiles of so many rows (and 128 columns)."""
        return not self.format.block_rows or self.format.block_rows % block_n == 0


# Codebooks -> what was derived from them: by the numbers' type and whether in pairs, the version of the codebooks and the words.
_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def _numbers(dtype: torch.dtype) -> torch.dtype:
    """What a table's numbers are for activations of this type; all of int8 is exact in each."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.int8


def entry_words(codebooks: torch.Tensor, dtype: torch.dtype, paired: bool = False) -> torch.Tensor:
    """A word for every entry, `[blocks down, blocks across, centroids]`; its `dim` numbers are int8, float16 or bfloat16.

    They are made at the first use of `codebooks` and live as long as these.

    Args:
        codebooks: int8 `[blocks down, blocks across, dim, centroids]`.
        dtype: of the activations.
        paired: a word for every two entries instead, the first of them that of the low half of the index.
    """
    key = _numbers(dtype), paired
    version = None if codebooks.is_inference() else codebooks._version
    known = _derived.setdefault(codebooks, {})
    if key in known and known[key][0] == version:
        return known[key][1]
    if memory.capturing(codebooks.device):
        return _words(codebooks, *key)
    known[key] = version, memory.apart(partial(_words, codebooks, *key), codebooks.device)
    return known[key][1]


def _words(codebooks: torch.Tensor, numbers: torch.dtype, paired: bool) -> torch.Tensor:
    entries = codebooks.transpose(2, 3).to(numbers)
    if paired:
        count = codebooks.shape[3]
        index = torch.arange(count * count, device=codebooks.device)
        entries = torch.cat([entries[:, :, index % count], entries[:, :, index // count]], 3)
    entries = entries.contiguous()
    return entries.view(WORDS[entries.shape[3] * entries.element_size()])[..., 0]


def _gather_rows(weight: Weight, block_n: int, gather: bool) -> int:
    """Rows of a tile: with `gather`, which needs one codebook for it, the largest power of two that has one."""
    while gather and block_n > TILE and not weight.one_book(block_n):
        block_n //= 2
    return block_n


def gemv(
    a: torch.Tensor, sa: torch.Tensor | None, weight: Weight, *, rows: int = 1, columns: int = 64, block_n: int = TILE,
    split: int = 1, gather: bool = False, warps: int = 4, stages: int = 2,
) -> torch.Tensor:  # fmt: skip
    """Partial sums float32 `[splits, rows, n]` of activations `[rows, k]`; with `sa` `[rows, blocks]` they are int8.

    Args:
        a, sa, weight: contiguous, on one device.
        rows: of a program, a power of two.
        columns: of a step, a power of two from 32 up; with `gather` 128 at most.
        block_n: rows of the weight in a program, a power of two from 16 up; with `gather` fewer where a codebook has fewer.
        split: programs that share the columns of a row; fewer where there are not as many steps.
        gather: look entries up by `tl.gather`.
        warps, stages: of the compiled kernel.
    """
    block_n = _gather_rows(weight, block_n, gather)
    weight = weight if gather else weight.in_pairs(a.dtype)
    spans = columns // weight.format.span
    steps = cdiv(weight.k, columns)
    steps_of_split = cdiv(steps, max(1, min(split, steps)))
    splits = cdiv(steps, steps_of_split)
    partials = a.new_empty((splits, a.shape[0], weight.n), dtype=torch.float32)
    with device.on(a.device):
        vq_kernels.gemv[cdiv(weight.n, block_n), splits, cdiv(a.shape[0], rows)](
            a, sa, *weight.tensors(a.dtype), partials, a.shape[0], weight.n, weight.k, steps_of_split * spans, *weight.sizes,
            cdiv(weight.k, ACTIVATION_BLOCK), **weight.constants, INTEGER=sa is not None, GATHER=gather, ROWS=rows,
            SPANS=spans, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partials


def dot(
    a: torch.Tensor, sa: torch.Tensor | None, weight: Weight, *, rows: int = 16, block_n: int = 64, split: int = 1,
    gather: bool = False, narrow: bool = False, warps: int = 4, stages: int = 2,
) -> torch.Tensor:  # fmt: skip
    """Partial sums float32 `[splits, rows, n]`, as `gemv`; `rows` are at least 16.

    With `narrow` entries are looked up as int8 for 16-bit activations too.
    """
    block_n = _gather_rows(weight, block_n, gather)
    numbers = torch.int8 if narrow else a.dtype
    weight = weight if gather else weight.in_pairs(numbers)
    segments = cdiv(weight.k, weight.segment)
    segments_of_split = cdiv(segments, max(1, min(split, segments)))
    splits = cdiv(segments, segments_of_split)
    partials = a.new_empty((splits, a.shape[0], weight.n), dtype=torch.float32)
    with device.on(a.device):
        vq_kernels.dot[cdiv(weight.n, block_n), splits, cdiv(a.shape[0], rows)](
            a, sa, *weight.tensors(numbers), partials, a.shape[0], weight.n, weight.k,
            segments_of_split, *weight.sizes, cdiv(weight.k, ACTIVATION_BLOCK), **weight.constants, INTEGER=sa is not None,
            GATHER=gather, ROWS=rows, SEGMENT=weight.segment, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partials


def dequantize(
    weight: Weight, dtype: torch.dtype, *, first: int = 0, count: int | None = None, block_n: int = 128, warps: int = 4
) -> torch.Tensor:
    """`count` rows of W from `first`, a multiple of 16, on: `[count, k]`, rounded to float32 and then to `dtype`."""
    count = weight.n - first if count is None else count
    weight = weight.in_pairs(dtype)
    made = torch.empty((count, weight.k), dtype=dtype, device=weight.codes.device)
    with device.on(made.device):
        vq_kernels.dequantize[cdiv(count, block_n), cdiv(weight.k, weight.segment)](
            *weight.tensors(dtype), made, first, count, weight.k, *weight.sizes, **weight.constants, SEGMENT=weight.segment,
            BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip
    return made


def embed(indices: torch.Tensor, weight: Weight, *, columns: int = 512, warps: int = 1) -> torch.Tensor:
    """Rows of W, float32 `[positions, k]`, for int64 indices `[positions]`; NaN for an index outside `[-n, n)`.

    Args:
        indices, weight: contiguous, on one device.
        columns: of a program, in whole segments, at least one.
        warps: of the compiled kernel.
    """
    y = torch.empty((indices.numel(), weight.k), device=indices.device)
    segments = max(1, columns // weight.segment)
    weight = weight.in_pairs(torch.int8)
    with device.on(y.device):
        vq_kernels.embed[indices.numel(), cdiv(weight.k, weight.segment * segments)](
            indices, *weight.tensors(torch.int8), y, weight.n, weight.k, *weight.sizes, **weight.constants,
            SEGMENT=weight.segment, SEGMENTS=segments, num_warps=warps,
        )  # fmt: skip
    return y
