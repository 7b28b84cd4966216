"""Tiny decoders compiled for torch once a test run, with float activations: `compiled("llama")`; and toy programs."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers

import qcompiler
from qcompiler.runtime.artifact import Artifact, CacheInfo, CacheLayer, CacheState, TensorInfo

VOCABULARY = 128
RECIPE = {
    "name": "weights", "linear": {"bits": 8, "group": 32, "activations": "float"}, "head": {"bits": 8, "activations": "float"},
    "passes": ["round_to_nearest"], "allow": {"min_coverage": 0},
}  # fmt: skip
_LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
_GPT = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
# What each has that the others have not: grouped heads in one attention op; scores and alibi added up, then a softmax; a table of
# masks as long as the context, of which slices are taken; windows; states beside keys and values; states alone.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "bloom": ("BloomForCausalLM", dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)),
    "gptj": ("GPTJForCausalLM", dict(_GPT, rotary_dim=8)),
    "mistral": ("MistralForCausalLM", dict(_LLAMA, sliding_window=8)),
    "lfm2": ("Lfm2ForCausalLM", dict(_LLAMA, layer_types=["conv", "full_attention"])),
    "mamba": ("MambaForCausalLM", dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)),
}


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def compiled(name: str) -> Path:
    """The artifact's directory."""
    class_name, options = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    return qcompiler.compile(model, output=_folder() / name, recipe=RECIPE, target="torch", samples=0).path


Named = Sequence[tuple[str, str]]


def toy(
    module: torch.nn.Module, example: Sequence[torch.Tensor], inputs: Named, outputs: Named
) -> tuple[torch.fx.GraphModule, Artifact]:
    """A program that was never compiled, and the manifest's part of it.

    Args:
        module: called with the example's tensors by position; what it calls a past comes back as the output of that name with
            `new_` before it.
        example: the axes that vary have a size of 5 (past) or 3 (new).
        inputs, outputs: (name, role) of each.
    """
    shapes = tuple({i: torch.export.Dim.AUTO for i, size in enumerate(t.shape) if size in (3, 5)} for t in example)
    program = torch.export.export(module.eval(), tuple(example), dynamic_shapes=shapes)
    loaded: Any = program.module(check_guards=False)
    names = {3: "length", 5: "past_length", 8: "total_length"}
    info = lambda name, role, t: TensorInfo(  # noqa: E731
        name, str(t.dtype).removeprefix("torch."), tuple(names.get(size, size) for size in t.shape), role
    )
    results = module(*(t.clone() for t in example))
    layers = [
        CacheLayer(k, v, f"new_{k}", f"new_{v}", 1, 4, "float32")
        for (k, role), (v, _) in zip(inputs, inputs[1:], strict=False)
        if role == "past_key"
    ]
    states = [CacheState(name, f"new_{name}") for name, role in inputs if role == "past_state"]
    artifact = SimpleNamespace(
        inputs=tuple(info(*named, tensor) for named, tensor in zip(inputs, example, strict=True)),
        outputs=tuple(info(*named, tensor) for named, tensor in zip(outputs, results, strict=True)),
        cache=CacheInfo("growing", None, tuple(layers), tuple(states)),
    )
    return loaded, cast(Artifact, artifact)


