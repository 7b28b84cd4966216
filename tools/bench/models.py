"""Models to measure: the bundled one, random ones of half a billion and a billion parameters, or any checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path

RANDOM = "random-0.5b"

# The usual proportions of a small decoder: grouped heads, gated MLP. All widths are multiples of 256, the super-block of
# llama.cpp's K formats, which would take another format in silence otherwise. 506 656 000 parameters.
SHAPES = {RANDOM: dict(
    vocab_size=32000, hidden_size=1280, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=20,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, rms_norm_eps=1e-5,
    bos_token_id=1, eos_token_id=2,
)}  # fmt: skip
# 1 100 048 384 parameters.
SHAPES["random-1b"] = SHAPES[RANDOM] | dict(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32
)


def source(name: str, work: Path) -> str:
    """What `qcompiler.compile` takes for `name`; the random model is written into `work` on first use."""
    return str(random_model(work / "models" / name, SHAPES[name])) if name in SHAPES else name


def random_model(folder: Path, shape: dict, seed: int = 0) -> Path:
    """A Llama with random weights of `shape` in `folder`, as bfloat16 safetensors; the same weights every time.

    A folder with another shape, of an earlier version of this file, is written anew.
    """
    written = folder / "config.json"
    if written.is_file() and shape.items() <= json.loads(written.read_text()).items():
        return folder
    written.unlink(missing_ok=True)
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    # So that a product keeps the size of what goes into it.
    deviation = shape["hidden_size"] ** -0.5
    tensors = {}
    for index, (name, size) in enumerate(shapes.items()):
        if len(size) == 1:  # a norm's weight
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + index)
            tensors[name] = torch.randn(size, generator=generator).mul_(deviation).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)  # last: it marks the directory as complete
    return folder
