"""A vector-quantized matrix: W = S · c · C[index] (formats: `qcompiler.ops.formats.VqFormat`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.ops.formats import VqFormat


@dataclass(frozen=True)
class VqWeight:
    """A quantized matrix.

    Attributes:
        indices: uint8 `[n, vectors]`: four for every `span` = 4·dim columns; vector 4·b + i holds the columns
            b·span + i + 4·j, j < dim. Columns beyond k are padding: their values mean nothing.
        codebooks: int8 `[blocks down, blocks across, centroids, dim]`.
        codebook_scales: float16 `[blocks down, blocks across]`: c.
        scales: float16 `[n, groups]`: S.
        columns: k.
        format: dim, centroids, blocks, group.
    """

    indices: torch.Tensor
    codebooks: torch.Tensor
    codebook_scales: torch.Tensor
    scales: torch.Tensor
    columns: int
    format: VqFormat

    def levels(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """The codebook entries, int8 `[n, k]`, or those of some rows: a slice, or row numbers `[m]`."""
        f, indices = self.format, self.indices[rows].long()
        n, vectors = indices.shape
        device = indices.device
        row = torch.arange(len(self.indices), device=device)[rows]
        down = row // f.block_rows if f.block_rows else torch.zeros_like(row)
        block = torch.arange(vectors, device=device) // 4 * f.span
        across = block // f.block_columns if f.block_columns else torch.zeros_like(block)
        entries = self.codebooks[down[:, None], across[None, :], indices]  # [n, vectors, dim]
        natural = entries.view(n, vectors // 4, 4, f.dim).transpose(2, 3)
        return natural.reshape(n, -1)[:, : self.columns].contiguous()

    def factors(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """S · c of every weight, float32 `[n, k]` or of some rows: exact, as the product of two float16 fits into a float32."""
        f, k = self.format, self.columns
        row = torch.arange(len(self.indices), device=self.scales.device)[rows]
        down = row // f.block_rows if f.block_rows else torch.zeros_like(row)
        own = self.scales[rows].float().repeat_interleave(f.group or k, dim=1)[:, :k]
        shared = self.codebook_scales[down].float().repeat_interleave(f.block_columns or k, dim=1)[:, :k]
        return own * shared

    def dequantize(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """W = (S · c) · C[index], float32 `[n, k]`, or some of its rows."""
        return self.levels(rows).float() * self.factors(rows)
