"""A packed affine weight on a device, as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.errors import InputError
from qcompiler.gpu.codes import WORD_COLUMNS
from qcompiler.ops import layout
from qcompiler.ops.formats import TILE, AffineFormat


@dataclass(frozen=True)
class Weight:
    """`W[n, k]`, or `experts` of them one after another: the tensors of docs/layout.md as they are stored.

    Attributes:
        words: `codes` as int32 `[experts · tiles, units, unit_bytes / 4]`.
        scales, zeros: as stored; zeros None where symmetric.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: AffineFormat
    n: int
    k: int
    experts: int = 1

    @property
    def tiles(self) -> int:
        """Of one matrix."""
        return -(-self.n // TILE)

    @property
    def groups(self) -> int:
        return self.format.groups(self.k)

    @property
    def row_words(self) -> int:
        """Words of a row (`qcompiler.gpu.codes`)."""
        return self.words.shape[1] * layout.UNIT_K[self.format.bits] // WORD_COLUMNS[self.format.bits]

    @property
    def center(self) -> int:
        """Zero point of the symmetric form among unsigned codes."""
        return 1 << (self.format.bits - 1)


def packed(
    op: str, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int, n: int, k: int,
    device: torch.device, experts: int = 1,
) -> Weight:  # fmt: skip
    """The weight, after a look at sizes, dtypes and places, which the kernels take for granted.

    Raises:
        InputError: a tensor that is not that of the format.
    """
    format = AffineFormat(bits, group, zeros is None)
    for name, tensor, dtype, (tiles, *rest) in (
        ("codes", codes, torch.uint8, layout.codes_shape(n, k, bits)),
        ("scales", scales, torch.float16, layout.scales_shape(n, k, format)),
        ("zeros", zeros, torch.uint8, layout.zeros_shape(n, k, format)),
    ):
        expect(op, name, tensor, dtype, (experts * tiles, *rest), device)
    words = codes.contiguous().view(torch.int32)
    return Weight(words, scales.contiguous(), None if zeros is None else zeros.contiguous(), format, n, k, experts)


def expect(
    op: str, name: str, tensor: torch.Tensor | None, dtypes: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int, ...],
    device: torch.device,
) -> None:  # fmt: skip
    """Raises InputError unless the tensor is left out or has a dtype of these, this shape and this place."""
    known = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor is not None and (tensor.dtype not in known or tuple(tensor.shape) != tuple(shape) or tensor.device != device):
        raise InputError(
            f"{op}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
            f"{' or '.join(map(str, known))} {list(shape)} on {device}"
        )
