"""Losses whose gradients say what the end of the model cares about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch.nn import functional

from qcompiler.errors import UsageError
from qcompiler.graph.graph import Graph
from qcompiler.sweep.ends import TOKENS, Ends, find_ends, tokens_that_count

Labels = Literal["text", "sampled"]
NONE = -100  # the label of a token that has none


class Loss(Protocol):
    """A sum over the tokens of one sample.

    Attributes:
        ends: what it is made of.
        labelled: tokens that it has summed over so far.
    """

    ends: Ends
    labelled: int

    def __call__(self, sample: dict[str, Any], values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss of a sample from the values of `ends.nodes`; called once a sample, in the samples' order."""


def end_loss(graph: Graph, labels: Labels, seed: int) -> Loss:
    """The loss of a model: cross entropy of its logits; where there are none, its outputs along seeded noise.

    Raises:
        UsageError: `labels` is `text` and the model's logits are not those of the next token.
    """
    ends = find_ends(graph)
    if not ends.logits:
        return Projection(ends, seed)
    if labels == "sampled":
        return SampledEntropy(ends, seed)
    if graph.kind != "decoder":
        raise UsageError("labels: text are each token's next one, and this model is no decoder; use labels: sampled")
    return NextToken(ends)


class NextToken:
    """−Σ log p(next token) over the tokens that have a next one in the text: what is padding has no label and is none."""

    def __init__(self, ends: Ends):
        self.ends = ends
        self.labelled = 0

    def __call__(self, sample: dict[str, Any], values: Sequence[torch.Tensor]) -> torch.Tensor:
        (logits,) = values
        ids = sample.get(TOKENS)
        if not isinstance(ids, torch.Tensor) or ids.shape != logits.shape[:2]:
            found = tuple(ids.shape) if isinstance(ids, torch.Tensor) else "none"
            raise UsageError(
                f"labels: text needs the tokens of every logit: {TOKENS} is {found}, the logits are of "
                f"{tuple(logits.shape[:2])} tokens; use labels: sampled"
            )
        counts = tokens_that_count(sample, *logits.shape[:2])
        labels = torch.full(ids.shape, NONE)
        labels[:, :-1] = torch.where(counts[:, 1:] & counts[:, :-1], ids[:, 1:], NONE)
        self.labelled += int((labels != NONE).sum())
        return _entropy(logits, labels)


class SampledEntropy:
    """−Σ log p(y), y drawn from p itself: E[g gᵀ] is then the Fisher information, the second order of KL(p ‖ p̃)."""

    def __init__(self, ends: Ends, seed: int):
        self.ends = ends
        self.labelled = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, sample: dict[str, Any], values: Sequence[torch.Tensor]) -> torch.Tensor:
        (logits,) = values
        mask = tokens_that_count(sample, *logits.shape[:2])
        # Every token draws, so that a mask changes no other token's label.
        likely = logits.detach().flatten(0, 1).softmax(-1).cpu()  # the same draws on every device
        drawn = torch.multinomial(likely, 1, generator=self._generator).to(logits.device)
        self.labelled += int(mask.sum())
        return _entropy(logits, torch.where(mask, drawn.reshape(mask.shape), NONE))


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the tokens with a label; nothing of the size of the logits is taken out of them."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NONE, reduction="sum")


class Projection:
    """Σ ⟨y, ε⟩, ε ~ N(0, 1): E[(∂l/∂z)²] is the diagonal of JᵀJ, the Gauss-Newton form of ‖y − ỹ‖² (Hutchinson)."""

    def __init__(self, ends: Ends, seed: int):
        self.ends = ends
        self.labelled = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, sample: dict[str, Any], values: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for value in values:
            noise = torch.randn(value.shape, generator=self._generator, device="cpu").to(value.device)
            if value.dim() == 3:
                noise *= tokens_that_count(sample, *value.shape[:2])[..., None]
            self.labelled += value[..., 0].numel()
            total = total + (value * noise).sum()
        return total
