"""Quantized weights of many experts as one: every tensor of `AffineWeight` with an axis of experts before its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from qcompiler.numerics.affine import AffineWeight, decibel


def stack(matrices: Sequence[AffineWeight]) -> AffineWeight:
    """Codes `[experts, n, k]`, scales and zeros `[experts, n, groups]` of matrices that have one shape and format."""
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    return AffineWeight(
        torch.stack([matrix.codes for matrix in matrices]),
        torch.stack([matrix.scales for matrix in matrices]),
        torch.stack(zeros) if zeros else None,
        matrices[0].format,
    )


def rows_joined(parts: Sequence[AffineWeight]) -> AffineWeight:
    """One matrix of the rows of several, which have one width and format."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return AffineWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].format,
    )


def matrices(weight: AffineWeight) -> Iterator[AffineWeight]:
    """Each expert's matrix of a stack, as views; a single matrix itself."""
    if weight.codes.dim() == 2:
        yield weight
        return
    for expert in range(weight.codes.shape[0]):
        zeros = None if weight.zeros is None else weight.zeros[expert]
        yield AffineWeight(weight.codes[expert], weight.scales[expert], zeros, weight.format)


def solve_stack(
    weights: Iterable[tuple[int, torch.Tensor]], solve: Callable[[torch.Tensor], AffineWeight]
) -> tuple[AffineWeight, float]:
    """Solve expert by expert; the stack, and 10·log10(Σ w² / Σ (w − w̃)²) over all of it.

    Args:
        weights: (expert, `[n, k]`) as `Graph.matrices` yields them; one is held at a time.
        solve: one matrix.

    Raises:
        ValueError: from `solve`, with the expert named.
    """
    solved: list[AffineWeight] = []
    signal = noise = 0.0
    for expert, weight in weights:
        try:
            solved.append(solve(weight))
        except ValueError as error:
            raise ValueError(f"expert {expert}: {error}") from error
        signal += weight.double().square().sum().item()
        noise += (weight.double() - solved[-1].dequantize()).square().sum().item()
    return stack(solved), decibel(signal, noise)
