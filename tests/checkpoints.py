"""Tiny checkpoints on disk, with the bundled reference model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers

from qcompiler.data import reference_model

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def tiny_decoder(folder: Path, tied: bool = False, **changes: object) -> Path:
    """A two-layer language model with random weights, large enough that its predictions are not all alike."""
    options = dict(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(options | changes)))
    return write(model, folder)


def tiny_encoder(folder: Path) -> Path:
    """A two-layer encoder with random weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return write(transformers.BertModel(config), folder)


def write(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Any model beside that tokenizer; it needs 4096 tokens to take any text."""
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copy(reference_model() / name, folder / name)
    return folder
