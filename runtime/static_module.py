"""A decoder's program together with the buffers of its cache, as one module: what is compiled, and captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcompiler.runtime.static_cache import StaticProgram


class StaticModule(torch.nn.Module):
    """Called with tokens int64 `[1, n]` and filled int64 `[]`: appends them and gives the logits `[1, n, vocabulary]`.

    The buffers keep their addresses until `replace` gives it others.

    Args:
        static: the program.
        pasts: a tensor for each of its `pasts`.
    """

    def __init__(self, static: StaticProgram, pasts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.program = static.module
        presents = {present: at for at, present in enumerate(static.outputs)}
        # A present of fixed shape is the past of the next run.
        self._states = [(at, presents[name]) for at, name in enumerate(static.presents) if name in presents]
        self._count = len(pasts)
        for at, tensor in enumerate(pasts):
            self.register_buffer(f"past_{at}", tensor, persistent=False)

    def pasts(self) -> list[torch.Tensor]:
        """The buffers, in the program's order."""
        return [getattr(self, f"past_{at}") for at in range(self._count)]

    def replace(self, pasts: Sequence[torch.Tensor]) -> None:
        """Other buffers in their place."""
        for at, tensor in enumerate(pasts):
            setattr(self, f"past_{at}", tensor)

    def clear(self, which: Sequence[bool]) -> None:
        """Fill some of the buffers with zeros."""
        for tensor, wanted in zip(self.pasts(), which, strict=True):
            if wanted:
                tensor.zero_()

    def forward(self, tokens: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        pasts = self.pasts()
        results = self.program(tokens, filled, *pasts)
        for at, result in self._states:
            pasts[at].copy_(results[result])
        return results[0]
