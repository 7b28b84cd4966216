"""Programs in float16 and bfloat16: which op computes in which type, and how far the result is from float32's.

On a CPU our ops take float32 alone, so they are run on widened inputs here, and their result is rounded: what the GPU's declare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.ops.spec import SPECS
from qcompiler.runtime.device import Placement
from qcompiler.runtime.precision import narrow
from qcompiler.runtime.session import Session
from qcompiler.runtime.static_cache import static_program
from qcompiler.runtime.static_ops import packet
from qcompiler.runtime.torch_decoder import StaticDecoder
from qcompiler.runtime.torch_program import cache_bytes
from tests.runtime.torch_decoders import VOCABULARY, compiled, toy

TOKENS = np.random.default_rng(2).integers(3, VOCABULARY, 30)
SHORT = (torch.float16, torch.bfloat16)
# Two layers of sums and products, each rounded once: a few units in the last place of the largest logit.
UNITS = 16


class Widened(TorchDispatchMode):
    """Our ops on float32, their result in the type of the first float input."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "qcompiler":
            return func(*args, **(kwargs or {}))
        name, short = func.overloadpacket.__name__.rpartition(".")[2], (torch.float16, torch.bfloat16)
        spec = SPECS.get(name)
        first = args[0]
        self.given.setdefault(name, set()).add(first.dtype)
        for declared, arg in zip(spec.inputs if spec is not None else (), args, strict=False):
            if declared.name in ("norm", "bias") and arg is not None:
                assert arg.dtype == torch.float32, declared.name
        is_short = lambda a: isinstance(a, torch.Tensor) and a.dtype in short  # noqa: E731
        wide = [a.float() if is_short(a) and _carries(spec, i) else a for i, a in enumerate(args)]
        result = func(*wide)
        return result.to(first.dtype) if first.is_floating_point() else result


def _carries(spec: Any, at: int) -> bool:
    """Whether an input is an activation; scales and outliers are float16 whatever the activations are."""
    return spec is None or (at < len(spec.inputs) and spec.inputs[at].name in ("x", "residual"))


@contextmanager
def widened() -> Iterator[Widened]:
    with torch.no_grad(), Widened() as mode:
        yield mode


def decoder(name: str, dtype: torch.dtype | None) -> StaticDecoder:
    """As `Session` makes it, but on the CPU, where it would be refused."""
    session = Session(compiled(name), threads=1)
    program: Any = session._program
    if dtype is not None:
        narrow(program.module, dtype, program.artifact)
        place = copy.copy(program.place)
        object.__setattr__(place, "dtype", str(dtype).removeprefix("torch."))
        program.place = place
    return StaticDecoder(program, static_program(program.module, program.artifact), 32)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", ["llama", "bloom", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_a_decoder_in_a_short_type(name: str, dtype: torch.dtype) -> None:
    exact, short = decoder(name, None), decoder(name, dtype)
    with widened() as mode:
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 15)):
            found = short.run(TOKENS[start:end], end - start)
            expected = exact.run(TOKENS[start:end], end - start)
            assert found.dtype == np.float32
            bound = UNITS * torch.finfo(dtype).eps * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
            assert np.abs(found - expected).max() > 0  # it was computed in another type
    # Keys and values are of the short type, states are not; every product of ours got the short type.
    kinds = {past: buffer.dtype for past, buffer in zip(short._static.pasts, short.module.pasts(), strict=True)}
    assert all(kind == (torch.float32 if past in short._states else dtype) for past, kind in kinds.items())
    for op, given in mode.given.items():
        if op in ("linear_nbit", "attention"):
            assert dtype in given


def edited(module: nn.Module, dtype: torch.dtype, *example: torch.Tensor) -> Any:
    inputs = [(f"x{i}", "other") for i in range(len(example))]
    loaded, artifact = toy(module, example, inputs, [("logits", "logits")])
    narrow(loaded, dtype, artifact)
    return loaded


def types(module: Any) -> dict[str, torch.dtype]:
    """The type of every op's result, as it is when it runs."""
    found: dict[str, torch.dtype] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                found[packet(n)] = result.dtype
                assert n.meta["val"].dtype == result.dtype, n
            return result

    with torch.no_grad():
        Watch(module).run(*module.example)
    return found


class Block(nn.Module):
    """A norm spelled out, a product, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.gain = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        normed = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return (nn.functional.linear(normed, self.weight).softmax(-1),)


@pytest.mark.parametrize("dtype", SHORT)
def test_norms_and_softmax_are_wide_and_products_are_short(dtype: torch.dtype) -> None:
    module = Block()
    x = torch.randn(3, 4)
    found = edited(module, dtype, x)
    assert {name: p.dtype for name, p in found.named_parameters()} == {"weight": dtype, "gain": torch.float32}
    # A value whose square float16 does not have.
    found.example = (300 * x.to(dtype),)
    kinds = types(found)
    assert [kinds[op] for op in ("pow", "mean", "rsqrt", "softmax")] == [torch.float32] * 4 and kinds["linear"] == dtype
    with torch.no_grad():
        (expected,) = module(found.example[0].float())
        (result,) = found(*found.example)
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


class Masked(nn.Module):
    def forward(self, q: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        bias = torch.zeros_like(q[0, 0] @ q[0, 0].T).masked_fill(mask > 0, torch.finfo(torch.float32).min)
        return (nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias),)


@pytest.mark.parametrize("dtype", SHORT)
def test_a_row_that_sees_nothing_is_no_nan(dtype: torch.dtype) -> None:
    """The lowest float32 is minus infinity in float16, and so are sums of it with a score."""
    mask = torch.zeros(3, 3)
    mask[1] = 1
    q = torch.randn(1, 1, 3, 4)
    found = edited(Masked(), dtype, q, mask)
    with torch.no_grad():
        (result,) = found(q.to(dtype), mask.to(dtype))
    assert result.dtype == dtype and bool(torch.isfinite(result).all())


def test_integers_and_masks_stay_as_they_are() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            at = torch.arange(x.shape[1])
            return (torch.where(at > 1, x, 2 * x) + at,)

    found = edited(Mixed(), torch.float16, torch.randn(3, 4))
    found.example = (torch.randn(3, 4, dtype=torch.float16),)
    kinds = types(found)
    assert (kinds["arange"], kinds["gt"], kinds["where"], kinds["add"]) == (torch.int64, torch.bool, *[torch.float16] * 2)


def test_what_a_trace_made_explicit_stays() -> None:
    class Explicit(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x * torch.arange(x.shape[1]).to(torch.float32),)

    found = edited(Explicit(), torch.bfloat16, torch.randn(3, 4))
    found.example = (torch.randn(3, 4, dtype=torch.bfloat16),)
    assert types(found) == {"arange": torch.int64, "to": torch.float32, "mul": torch.float32}


def test_the_bytes_of_a_cache() -> None:
    llama = Session(compiled("llama"), threads=1).artifact
    assert cache_bytes(llama, 10) == 2 * 2 * 2 * 10 * 16 * 4 and cache_bytes(llama, 10, "float16") == 2 * 2 * 2 * 10 * 16 * 2


def test_no_short_type_on_the_cpu() -> None:
    from qcompiler.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="run on a GPU"):
        Session(compiled("llama"), dtype="bfloat16")
    assert Placement().is_default
