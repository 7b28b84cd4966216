#!/usr/bin/env python3
"""Write a Llama checkpoint of random weights, of any size, in a few hundred megabytes of memory.

    tools/random_checkpoint.py --shape 7b --out DIR                     sharded safetensors, bfloat16
    tools/random_checkpoint.py --shape 0.1b --dtype float32 --tied --out DIR
    tools/random_checkpoint.py --hidden 512 --layers 4 --heads 8 --kv-heads 2 --mlp 1408 --vocab 8192 --out DIR

For what depends on sizes alone: memory, time, file layouts. Text that goes in comes out as noise. The tokenizer is the
bundled reference model's, its ids the first of the vocabulary. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from qcompiler.data import reference_model  # noqa: E402

CHUNK = 2**22  # weights that are drawn at once
SHARD_BYTES = 2**31
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: widths, layers, heads of queries, heads of keys and values, rows of the embedding."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight, in the order of the graph."""
        head = self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            within = f"model.layers.{layer}"
            yield f"{within}.input_layernorm.weight", (self.hidden,)
            yield f"{within}.self_attn.q_proj.weight", (self.heads * head, self.hidden)
            yield f"{within}.self_attn.k_proj.weight", (self.kv_heads * head, self.hidden)
            yield f"{within}.self_attn.v_proj.weight", (self.kv_heads * head, self.hidden)
            yield f"{within}.self_attn.o_proj.weight", (self.hidden, self.heads * head)
            yield f"{within}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{within}.mlp.gate_proj.weight", (self.mlp, self.hidden)
            yield f"{within}.mlp.up_proj.weight", (self.mlp, self.hidden)
            yield f"{within}.mlp.down_proj.weight", (self.hidden, self.mlp)
        yield "model.norm.weight", (self.hidden,)
        if not tied:
            yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES = {
    "0.1b": Shape(768, 2048, 10, 12, 4, 16384),
    "0.5b": Shape(1536, 4096, 16, 12, 4, 32000),
    "1b": Shape(2048, 5632, 20, 16, 4, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


def write(
    out: Path, shape: Shape, dtype: str = "bfloat16", seed: int = 0, tied: bool = False, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the checkpoint to `out`, which must be new or empty; returns the bytes of the weights.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: sizes that no model has.
    """
    if min(vars(shape).values()) < 1:
        raise ValueError(f"{shape}: every size must be at least 1")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.hidden // shape.heads % 2:
        raise ValueError(f"{shape}: hidden must be a multiple of 2·heads, heads a multiple of kv_heads")
    tokens = len(json.loads((reference_model() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    if shape.vocab < tokens:
        raise ValueError(f"vocab is {shape.vocab}; the tokenizer that is written beside the weights has {tokens} tokens")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory; choose another")
    out.mkdir(parents=True, exist_ok=True)
    shards = _shards(list(shape.tensors(tied)), DTYPES[dtype].itemsize, shard_bytes)
    weight_map, total, index = {}, 0, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(out / name, tensors, dtype, seed, index)
        index += len(tensors)
        weight_map |= dict.fromkeys((tensor for tensor, _ in tensors), name)
    if len(shards) == 1:
        (out / name).rename(out / "model.safetensors")
    else:
        listed = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2))
    for file in TOKENIZER:
        shutil.copyfile(reference_model() / file, out / file)
    (out / "config.json").write_text(json.dumps(_config(shape, dtype, tied), indent=2))  # last: it makes it a model
    return total


def _config(shape: Shape, dtype: str, tied: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "bos_token_id": 0, "eos_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


def _shards(tensors: list[tuple[str, tuple[int, ...]]], item: int, limit: int) -> list[list]:
    shards: list[list] = [[]]
    size = 0
    for name, shape in tensors:
        bytes_ = item * torch.Size(shape).numel()
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += bytes_
    return shards


def _write_shard(path: Path, tensors: list, dtype: str, seed: int, first: int) -> int:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        end = offset + DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as safetensors writes it
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, (_, shape) in enumerate(tensors):
            for part in _weights(shape, seed * 1_000_003 + first + index):
                file.write(part.to(DTYPES[dtype]).view(torch.uint8).numpy().data)
    return offset


def _weights(shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Float32 in pieces: ones for a norm; else normal of deviation 1/sqrt(inputs), so that sizes survive a product."""
    if len(shape) == 1:
        yield torch.ones(shape)
        return
    generator = torch.Generator().manual_seed(seed)
    left = torch.Size(shape).numel()
    while left:
        yield torch.randn(min(left, CHUNK), generator=generator).mul_(shape[1] ** -0.5)
        left -= min(left, CHUNK)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--shape", choices=SHAPES, default="0.1b", help="sizes to begin with [0.1b]")
    for name in Shape.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="in place of the shape's")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tied", action="store_true", help="embedding and head are one weight")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="of a file at most [2 GiB]")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in Shape.__dataclass_fields__ if getattr(chosen, name) is not None}
    try:
        size = write(
            chosen.out, replace(SHAPES[chosen.shape], **given), chosen.dtype, chosen.seed, chosen.tied, chosen.shard_bytes
        )
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"{chosen.out}: {size:,} bytes of {chosen.dtype} weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
