"""One-token steps of a decoder, captured once as a CUDA graph and replayed: no time goes into starting its many kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

WARM_UPS = 2  # kernels are compiled and workspaces taken before anything is captured


class NotCaptured(Exception):
    """torch refused a capture; the message says why. What was to be captured runs as it is."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it again, on the same addresses."""


# Runs a function a few times, captures one run of it, and gives that.
Capture = Callable[[Callable[[], None], torch.device], Graph]


def capture(function: Callable[[], None], device: torch.device) -> Graph:
    """A CUDA graph of `function()`, whose tensors stay where they are. The capture itself computes nothing.

    Raises:
        NotCaptured: `function` runs, but cannot be captured.
    """
    before = torch.cuda.current_stream(device)
    # A stream of this device: torch keeps one for all captures, of the device that was current at the first of them.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Of this thread alone: what others do on the GPU meanwhile does not end the capture.
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # which torch does not do where the end of a capture fails
        reason = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # what ended it comes first
        raise NotCaptured(f"torch cannot capture it: {(str(reason).splitlines() or [''])[0]}") from error
    return graph


class StepGraph:
    """A module's run on one token, replayed.

    Args:
        module: called with tokens int64 `[1, 1]` and filled int64 `[]`; reads and writes its own buffers beside them.
        states: those of its buffers that a run replaces; a run for warming up must not count.
        device: where all of it is.
        capture: how to capture; another one in tests.
    """

    def __init__(
        self, module: torch.nn.Module, states: Sequence[torch.Tensor], device: torch.device, capture: Capture = capture
    ) -> None:
        self._module, self._states, self._device, self._capture = module, states, device, capture
        self._tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._filled = torch.zeros((), dtype=torch.int64, device=device)
        self._logits = torch.empty(0)
        self._graph: Graph | None = None

    def run(self, token: int, filled: int) -> torch.Tensor:
        """The logits `[1, 1, vocabulary]` after `token` at position `filled`; the next run overwrites them.

        Raises:
            NotCaptured: by the capture; states are as they were.
        """
        self._tokens.fill_(token)
        self._filled.fill_(filled)
        if self._graph is None:
            before = [state.clone() for state in self._states]
            try:
                self._graph = self._capture(self._once, self._device)
            finally:
                for state, value in zip(self._states, before, strict=True):
                    state.copy_(value)
        self._graph.replay()
        return self._logits

    def _once(self) -> None:
        with torch.no_grad():
            self._logits = self._module(self._tokens, self._filled)


def what_cannot_be_captured(module: torch.fx.GraphModule) -> str | None:
    """The first node whose result's size depends on values, which a GPU must be waited for; None where there is none."""
    for node in module.graph.nodes:
        val = node.meta.get("val")
        for value in val if isinstance(val, (tuple, list)) else (val,):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(s, torch.SymInt) and torch.fx.experimental.symbolic_shapes.free_unbacked_symbols(s) for s in sizes):
                return f"the size of {node.name} ({node.target}) depends on values"
    return None
