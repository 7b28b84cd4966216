"""Whole programs on a GPU that is not there: nothing is left on the CPU, and nothing makes the host wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompiler
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
