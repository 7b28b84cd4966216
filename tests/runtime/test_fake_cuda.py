"""Whole programs on a GPU that is not there: nothing is left on the CPU, and nothing makes the host wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompiler
from qcompiler.ops.attention import _elsewhere
from tests.runtime.fake_cuda import CUDA, Found, Plant, Watch, fake_cuda, watched
from tests.runtime.torch_decoders import MODELS, compiled
from tools.tiny_configurations import classes, tiny_model

EVERY = [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_a_decoder_stays_on_the_gpu(name: str) -> None:
    """A prompt and a step, in float32 and in a short type."""
    for dtype in (torch.float32, torch.bfloat16):
        assert any(op.startswith("qcompiler.linear_nbit") for op in watched(compiled(name), dtype).ops)


# What they have that the decoders above have not: texts of any batch, two texts, experts, states, a cache that grows.
TINY = ("bert_encoder", "t5_seq2seq", "mixtral", "jamba", "mamba2", "gpt_oss")
WEIGHTS: dict[str, Any] = {
    "linear": {"bits": 4, "group": 32, "activations": "float"}, "head": {"bits": 8, "activations": "float"},
    "passes": ["round_to_nearest"], "allow": {"min_coverage": 0, "fallbacks": 99},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model_stays_on_the_gpu(name: str, tmp_path: Path) -> None:
    model = tiny_model(getattr(transformers, classes()[name][0]), name)
    recipe = WEIGHTS | {"name": name}
    path = qcompiler.compile(model, output=tmp_path / name, recipe=recipe, target="torch", samples=0).path
    for dtype in (torch.float32, torch.float16):
        assert sum(watched(path, dtype).ops.values()) > 100


FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group": 32},
    "int8": {"bits": 8, "activations": "int8-token"},
    "vq2": {"vq": "vq2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_model_stays_on_the_gpu(name: str, tmp_path: Path) -> None:
    recipe = {"name": name, "linear": FORMATS[name], "passes": [{"round_to_nearest": {"iterations": 2}}]}
    path = qcompiler.compile("reference", output=tmp_path / name, recipe=recipe, target="torch", samples=0).path
    for dtype in (torch.float32, torch.bfloat16):
        ops = watched(path, dtype).ops
        assert ops["qcompiler.linear_vq.default" if name == "vq2" else "qcompiler.linear_nbit.default"] > 40


def _constant(module: torch.fx.GraphModule) -> None:
    owner = next(owner for owner in module.modules() if owner._buffers)
    name, value = next(iter(owner._buffers.items()))
    assert value is not None and value.device == CUDA
    owner._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)


def _positions(module: torch.fx.GraphModule) -> None:
    """What a program does that was moved before its cache was put in place."""
    count = next(node for node in module.graph.nodes if node.op == "call_function")
    with module.graph.inserting_before(count):
        module.graph.call_function(torch.ops.aten.arange.default, (4,), {"device": torch.device("cpu")})


@pytest.mark.parametrize("plant, found", [(_constant, "takes a tensor"), (_positions, r"arange.default gives a tensor \[4\]")])
def test_what_is_planted_in_a_program_is_found(plant: Plant, found: str) -> None:
    with pytest.raises(Found, match=found):
        watched(compiled("llama"), plant=plant)


OPS: dict[str, Callable[[torch.Tensor], object]] = {
    "on cpu": lambda x: x + torch.ones(3),
    r"\[\] on cpu": lambda x: x * torch.tensor(2.0),
    "gives a tensor": lambda x: x.cpu(),
    "full.default": lambda x: torch.full((2,), 1.0),
    "_local_scalar_dense": lambda x: x.sum().item(),
    "nonzero": lambda x: torch.ops.aten.nonzero.default(x),
    "masked_select": lambda x: torch.ops.aten.masked_select.default(x, x > 0),
}


@pytest.mark.parametrize("found", OPS)
def test_what_a_gpu_or_a_capture_does_not_take_is_found(found: str) -> None:
    with fake_cuda():
        x = torch.ones(3, device=CUDA)
        with pytest.raises(Found, match=found), Watch():
            OPS[found](x)
        with Watch() as watch:
            assert (x + torch.arange(3, device=CUDA)).device == CUDA
    assert watch.ops["aten.add.Tensor"] == 1


@pytest.mark.parametrize("heads_of_mask", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_elsewhere(rows: int, dtype: torch.dtype, heads_of_mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against softmax in float64; no head of k and v is wanted more than once."""
    generator = torch.Generator().manual_seed(rows)
    random = lambda *shape: torch.randn(1, *shape, generator=generator)  # noqa: E731
    q, k, v = random(8, rows, 16), random(2, 20, 16), random(2, 20, 16)
    mask = random(heads_of_mask, rows, 20) if dtype == torch.float32 else random(heads_of_mask, rows, 20) > 0
    asked: list[tuple[int, int]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> torch.Tensor:
        asked.append((query.shape[1], key.shape[1]))
        assert key is k and value is v
        return real(query, key, value, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    found = _elsewhere(q, k, v, mask, 0.3)
    wide_k, wide_v = (t.double().repeat_interleave(4, 1) for t in (k, v))
    scores = 0.3 * q.double() @ wide_k.transpose(2, 3)
    scores = scores.masked_fill(~mask, -torch.inf) if dtype == torch.bool else scores + mask
    torch.testing.assert_close(found, (scores.softmax(-1) @ wide_v).float(), rtol=0, atol=2e-6)
    assert asked == [(2, 2)]
    declared = torch.empty(1, rows, 8, 16).transpose(1, 2)
    assert found.shape == declared.shape and found.transpose(1, 2).is_contiguous()
