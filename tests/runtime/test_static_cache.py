"""Caches in place: the same logits as with caches that grow, whatever lies behind the filled part; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from qcompiler.runtime.bench import bench
from qcompiler.runtime.session import Session
from qcompiler.runtime.static_cache import Refused, static_program
from qcompiler.runtime.static_ops import packet
from qcompiler.runtime.torch_decoder import GrowingDecoder, StaticDecoder
from tests.runtime.torch_decoders import MODELS, VOCABULARY, compiled, toy

EVERY = [name if name in ("llama", "bloom") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, 60)
# Softmax and products over more places, with the same numbers in them and zeros: sums in another order.
ROUNDING = 2e-6


def static(name: str, capacity: int | None = None) -> StaticDecoder:
    decoder = Session(compiled(name), threads=1, capacity=capacity).decoder
    assert isinstance(decoder, StaticDecoder)
    return decoder


def growing(name: str) -> GrowingDecoder:
    program = Session(compiled(name), threads=1)._program
    assert program is not None
    return GrowingDecoder(program)


def pieces(decoder: Any, *sizes: int) -> list[tuple[int, int]]:
    most = decoder.step or max(sizes)
    sizes = tuple(min(most, size - at) for size in sizes for at in range(0, size, most))
    ends = np.cumsum(sizes)
    return [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("name", EVERY)
def test_the_logits_are_those_of_a_growing_cache(name: str) -> None:
    """A prompt, steps, pieces of several lengths, through two reallocations."""
    one, other = static(name, capacity=8), growing(name)
    for start, end in pieces(one, 5, 1, 1, 13, 1, 20, 2):
        assert_same(one.run(TOKENS[start:end], end - start), other.run(TOKENS[start:end], end - start))
        assert one.length == other.length == end
    if name != "mamba":
        assert one.capacity == 64 and one.reallocations == 2


@pytest.mark.parametrize("name", EVERY)
def test_what_lies_behind_the_filled_part_changes_nothing(name: str) -> None:
    one, other = static(name, capacity=64), static(name, capacity=64)
    for start, end in pieces(one, 7, 1, 1, 6, 1):
        for past, buffer in zip(one._static.pasts, one.module.pasts(), strict=True):
            if past not in one._states:
                buffer[:, :, start:] = 1e4
        found = one.run(TOKENS[start:end], end - start)
        np.testing.assert_array_equal(found, other.run(TOKENS[start:end], end - start))


@pytest.mark.parametrize("name", EVERY)
def test_after_a_reset_nothing_is_left_of_the_text_before(name: str) -> None:
    decoder = static(name, capacity=64)
    run = lambda: [decoder.run(TOKENS[a:b], 1) for a, b in pieces(decoder, 6, 1, 2)]  # noqa: E731
    first = run()
    for start, end in pieces(decoder, 20):
        decoder.run(TOKENS[start:end] % 7, 1)
    decoder.reset()
    assert decoder.length == 0
    np.testing.assert_array_equal(run(), first)


def test_buffers_stay_where_they_are_and_steps_have_one_shape() -> None:
    decoder = static("llama", capacity=64)
    decoder.run(TOKENS[:9], 1)
    before = [(buffer.data_ptr(), buffer.shape) for buffer in decoder.module.pasts()]
    assert all(shape == (1, 2, 64, 16) for _, shape in before)
    for token in TOKENS[9:40]:
        decoder.run(np.array([token]), 1)
    assert [(buffer.data_ptr(), buffer.shape) for buffer in decoder.module.pasts()] == before
    nodes = list(decoder.module.program.graph.nodes)
    assert [packet(node) for node in nodes].count("index_copy_") == 4
    sizes = [node for node in nodes if packet(node) == "sym_size" and node.args[0].name != "input_ids"]
    assert len(sizes) == 1  # the capacity: no length of a text is left in the graph


def test_torch_compile_takes_the_module_as_one_graph() -> None:
    decoder, other = static("llama", capacity=32), static("llama", capacity=32)
    module = torch.compile(decoder.module, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for position, token in enumerate(TOKENS[:6]):
            found = module(torch.tensor([[int(token)]]), torch.tensor(position))
            assert_same(found[0].numpy(), other.run(np.array([token]), 1))


@pytest.mark.slow  # a C++ compiler runs
def test_inductor_compiles_a_step_once_with_our_ops_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that inductor fuses may be in another order: a few units in the last place of the largest logit."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    decoder, other = static("llama", capacity=32), static("llama", capacity=32)
    torch._dynamo.reset()
    module = torch.compile(decoder.module, fullgraph=True, dynamic=False, mode="max-autotune")

    def step(position: int) -> np.ndarray:
        return module(torch.tensor([[int(TOKENS[position])]]), torch.tensor(position))[0].numpy()

    # A compile for another length would be an error.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        first, code = run_and_get_code(step, 0)
        found = [first, *(step(position) for position in range(1, 12))]
    torch._dynamo.reset()
    calls = sum(text.count("torch.ops.qcompiler.linear_nbit.default(") for text in code)
    assert calls == sum("linear_nbit" in packet(node) for node in decoder.module.program.graph.nodes) > 0
    for position, logits in enumerate(found):
        assert_same(logits, other.run(TOKENS[position : position + 1], 1))


def test_a_session_uses_it_and_bench_names_it() -> None:
    session = Session(compiled("llama"), threads=1)
    other = growing("llama")
    assert_same(session.prefill(TOKENS[:10]), other.run(TOKENS[:10], 1)[-1])
    assert_same(session.step(5), other.run(np.array([5]), 1)[-1])
    result = bench(compiled("llama"), prompt_tokens=4, new_tokens=2, repeats=1, threads=1)
    assert (result["cache"], result["device"], result["dtype"]) == ("static", "cpu", "float32")


# ---- programs that keep a growing cache

INPUTS = (("tokens", "tokens"), ("key", "past_key"), ("value", "past_value"))
OUTPUTS = (("logits", "logits"), ("new_key", "present_key"), ("new_value", "present_value"))
EXAMPLE = (torch.arange(3)[None], torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))


class Toy(nn.Module):
    """Attention without any projection; the parts that may be wrong are methods."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))

    def joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, new], 2)

    def attend(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int) -> torch.Tensor:
        rows, total = x.shape[2], key.shape[2]
        seen = torch.arange(total) <= torch.arange(past, total)[:, None]
        scores = (x @ key.transpose(2, 3)).masked_fill(~seen, -1e9)
        assert scores.shape[2] == rows
        return scores.softmax(-1) @ value

    def forward(self, tokens: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, past = self.table[tokens][:, None], key.shape[2]
        key, value = self.joined(key, x), self.joined(value, 2 * x)
        return (x + self.attend(x, key, value, past))[:, 0], key, value


def edited(module: nn.Module) -> Any:
    return static_program(*toy(module, EXAMPLE, INPUTS, OUTPUTS))


def test_a_toy_computes_the_same() -> None:
    module, capacity = Toy(), 12
    found = edited(module)
    assert found.pasts == ("key", "value") and found.outputs == ("logits",) and found.limit is None
    buffers = [torch.full((1, 1, capacity, 4), 1e3) for _ in range(2)]
    key = value = torch.zeros(1, 1, 0, 4)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        tokens = torch.arange(start, end)[None]
        expected, key, value = module(tokens, key, value)
        (logits,) = found.module(tokens, torch.tensor(start), *buffers)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(buffers[0][:, :, :end], key)


class Tabled(Toy):
    """A table of masks as long as the context, of which the rows and columns of a step are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(11, 11, dtype=torch.bool).tril())

    def attend(self, x, key, value, past):
        seen = self.seen[past : key.shape[2], : key.shape[2]]
        return (x @ key.transpose(2, 3)).masked_fill(~seen, -1e9).softmax(-1) @ value


def test_rows_and_columns_of_a_table_are_taken_and_its_size_is_the_limit() -> None:
    module, found = Tabled(), edited(Tabled())
    assert found.limit == 11
    buffers = [torch.zeros(1, 1, 11, 4) for _ in range(2)]
    key = value = torch.zeros(1, 1, 0, 4)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        tokens = torch.arange(start, end)[None]
        expected, key, value = module(tokens, key, value)
        (logits,) = found.module(tokens, torch.tensor(start), *buffers)
        torch.testing.assert_close(logits, expected)


class ReadsThePast(Toy):
    def attend(self, x, key, value, past):
        return super().attend(x, key, value, past) + key.mean(2, keepdim=True)


class Unweighed(Toy):
    def attend(self, x, key, value, past):
        return (x @ key.transpose(2, 3)) @ value


class InFront(Toy):
    def joined(self, past, new):
        return torch.cat([new, past], 2)


class Scaled(Toy):
    def joined(self, past, new):
        return torch.cat([0.5 * past, new], 2)


class Moved(Toy):
    def joined(self, past, new):
        return torch.cat([past, new], 2) + torch.cat([past, 0 * new, past.new_zeros(1, 1, 0, 4)], 2)


class Folded(Toy):
    def attend(self, x, key, value, past):
        return super().attend(x, key, value, past) + key.reshape(1, 1, -1).cumsum(-1)[..., :4].unsqueeze(2)


class Changed(Toy):
    def forward(self, tokens, key, value):
        logits, key, value = super().forward(tokens, key, value)
        return logits, key * 2, value


REFUSED = {
    ReadsThePast: r"mean \(mean\) has cached positions on an axis, and nothing is known",
    Unweighed: "sums over cached positions that no softmax has weighed",
    InFront: "reads a past cache, which only the concatenation",
    Scaled: r"mul \(mul\) has an axis of \w+, expected all positions or none",
    Moved: "reads a past cache, which only the concatenation",
    Folded: "has an axis of 4",
    Changed: "new_key is not key with the new tokens behind it",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_uses_of_the_cache_are_refused_by_name(kind: type[Toy]) -> None:
    with pytest.raises(Refused, match=REFUSED[kind]):
        edited(kind())


def test_a_growing_cache_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Refused("node x is in the way")

    monkeypatch.setattr("qcompiler.runtime.static_cache.static_program", refuse)
    decoder: Any = Session(compiled("llama"), threads=1).decoder
    assert decoder.cache_kind == "growing" and decoder.reason == "node x is in the way"
