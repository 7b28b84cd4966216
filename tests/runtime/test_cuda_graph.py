"""Steps that are captured once and replayed: what does not need a GPU; what does is skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qcompiler.runtime.cuda_graph import NotCaptured, StepGraph, capture, what_cannot_be_captured
from qcompiler.runtime.session import Session
from qcompiler.runtime.torch_decoder import StaticDecoder
from tests.runtime.torch_decoders import VOCABULARY, compiled

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, 40)
CPU = torch.device("cpu")


class Recorder:
    """Captures as a GPU would: the function runs to warm up, its result has one address, and a replay fills it anew."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], None], device: torch.device) -> Any:
        for _ in range(2):
            function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            function()

        return SimpleNamespace(replay=replay)


def decoders(name: str, capacity: int) -> tuple[StaticDecoder, StaticDecoder, Recorder]:
    """With captured steps, and without."""
    plain = Session(compiled(name), threads=1, capacity=capacity).decoder
    assert isinstance(plain, StaticDecoder) and plain.uncaptured == "on cpu"
    recorder = Recorder()
    return StaticDecoder(plain._program, plain._static, capacity, recorder), plain, recorder


def test_replayed_steps_give_the_same_logits() -> None:
    captured, plain, recorder = decoders("llama", 8)
    assert captured.uncaptured is None
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
        np.testing.assert_array_equal(captured.run(TOKENS[start:end], 1), plain.run(TOKENS[start:end], 1))
        assert captured.length == plain.length == end
    # The buffers were replaced once, and the graph with them; pieces of several rows are never captured.
    assert (captured.reallocations, recorder.captures, recorder.replays) == (1, 2, 5)
    captured.reset()
    plain.reset()
    np.testing.assert_array_equal(captured.run(TOKENS[:1], 1), plain.run(TOKENS[:1], 1))
    assert recorder.captures == 2


class Counting(nn.Module):
    """A state that every run moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2))

    def forward(self, tokens: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        self.state.add_(tokens[0, 0].float())
        return torch.stack([self.state.sum(), filled.float()]).reshape(1, 1, 2)


def test_runs_for_warming_up_do_not_count() -> None:
    module, recorder = Counting(), Recorder()
    graph = StepGraph(module, [module.state], CPU, recorder)
    assert graph.run(3, 7).flatten().tolist() == [6.0, 7.0]
    assert graph.run(4, 8).flatten().tolist() == [14.0, 8.0]
    assert recorder.captures == 1 and module.state.tolist() == [7.0, 7.0]


def test_what_cannot_be_captured_after_all_runs_as_it_is_and_says_why() -> None:
    captured, plain, _ = decoders("llama", 8)

    def refuse(function: Callable[[], None], device: torch.device) -> Any:
        function()
        raise NotCaptured("torch cannot capture it: an op waits")

    captured._capture = refuse
    for start, end in ((0, 4), (4, 5), (5, 6)):
        np.testing.assert_array_equal(captured.run(TOKENS[start:end], 1), plain.run(TOKENS[start:end], 1))
    assert captured.uncaptured == "torch cannot capture it: an op waits" and captured.length == 6
    module = Counting()
    graph = StepGraph(module, [module.state], CPU, refuse)
    with pytest.raises(NotCaptured):
        graph.run(3, 7)
    assert module.state.tolist() == [0.0, 0.0]


class Device:
    """As much of torch.cuda as a capture asks for; everything that is done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str | None = None) -> None:
        self.done: list[str] = []
        self.fails, self.stream = fails, "the caller's"
        for name in ("Stream", "current_stream", "set_stream", "CUDAGraph", "device", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "stream", self._enter)

    def _Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name=f"a stream of {device}", wait_stream=lambda other: self.done.append("side waits"))

    def _current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name=self.stream, wait_stream=lambda other: self.done.append("caller waits"))

    def _set_stream(self, stream: Any) -> None:
        self.stream = stream.name

    def _CUDAGraph(self) -> str:
        return "graph"

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def _enter(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextmanager
    def _graph(self, graph: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.done.append(f"capture {capture_error_mode}")
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            if self.fails is not None:  # torch's own way out: the first error is behind the one of the end
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream = before


def test_a_capture_takes_a_stream_of_its_device_and_gives_the_callers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    streams: list[str] = []
    assert capture(lambda: streams.append(device.stream), torch.device("cuda", 1)) == "graph"
    assert streams == ["a stream of cuda:1"] * 3 and device.stream == "the caller's"
    assert device.done == ["side waits", "caller waits", "capture thread_local"]


def test_a_capture_that_fails_says_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, fails="at its end")
    runs: list[int] = []

    def function() -> None:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(NotCaptured, match=r"^torch cannot capture it: operation not permitted when stream is capturing$"):
        capture(function, torch.device("cuda", 0))
    assert device.stream == "the caller's"

    def broken() -> None:
        raise RuntimeError("a mistake of the program")

    with pytest.raises(RuntimeError, match="a mistake of the program"):  # before anything is captured
        capture(broken, torch.device("cuda", 0))


def test_tokens_and_lengths_are_read_where_they_were_captured() -> None:
    seen: list[tuple[int, int]] = []
    module: Any = lambda tokens, filled: seen.append((tokens.data_ptr(), filled.data_ptr())) or torch.zeros(1, 1, 1)  # noqa: E731
    graph = StepGraph(module, [], CPU, Recorder())
    graph.run(1, 0)
    graph.run(2, 1)
    assert len(set(seen)) == 1 and len(seen) == 4


def test_a_size_that_depends_on_values_is_not_captured() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nonzero(x).sum()

    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    loaded: Any = torch.export.export(Chosen(), (torch.ones(3),)).module(check_guards=False)
    assert str(what_cannot_be_captured(loaded)).startswith("the size of nonzero (aten.nonzero.default) depends on values")
    loaded = torch.export.export(Whole(), (torch.ones(3),)).module(check_guards=False)
    assert what_cannot_be_captured(loaded) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu(dtype: Any) -> None:
    """The same tokens as on the CPU, and steps bit-equal to those that are not captured."""
    expected = Session(compiled("llama"), threads=1, capacity=64)
    session = Session(compiled("llama"), capacity=64, device="cuda", dtype=dtype)
    decoder = session.decoder
    assert isinstance(decoder, StaticDecoder) and decoder.uncaptured is None
    eager = StaticDecoder(decoder._program, decoder._static, 64)
    eager.uncaptured = "for this test"
    bound = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    for start, end in ((0, 9), *((i, i + 1) for i in range(9, 40))):
        wanted = expected.decoder.run(TOKENS[start:end], 1)
        found = decoder.run(TOKENS[start:end], 1)
        np.testing.assert_array_equal(found, eager.run(TOKENS[start:end], 1))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound * np.abs(wanted).max())
