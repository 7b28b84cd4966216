#!/usr/bin/env python3
"""Train a small language model like the bundled reference model, or a bigger one, from text that is already here.

    tools/train_reference_lm.py --out DIR                              the reference model's shape, 75 minutes
    tools/train_reference_lm.py --out DIR --device cuda --hidden 768 --layers 12 --heads 12 --kv-heads 4 --mlp 2048 \
        --vocab 16384 --context 512 --steps 20000 --megabytes 600
    tools/train_reference_lm.py --out DIR --smoke                      seconds, to see that it works

The result is a Hugging Face checkpoint (bfloat16 safetensors), its tokenizer, and a README with its perplexities. A
run that is stopped (Ctrl-C, SIGTERM) saves its state and exits with 75; the same command goes on from there. One JSON
object with the figures is printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from reference_corpus import gather  # noqa: E402  # beside this file

from qcompiler.evaluate import evaluate  # noqa: E402

END = "<|endoftext|>"
STATE, TRAIN, HELD_OUT = "training.pt", "train.npy", "held_out.npy"
SMOKE = dict(hidden=64, layers=2, heads=2, kv_heads=1, mlp=128, vocab=512, context=64, batch=16, steps=60, megabytes=2)
STOPPED = 75


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory, or one of a stopped run")
    for name, default in dict(
        hidden=256, layers=6, heads=4, kv_heads=2, mlp=704, vocab=4096, context=256, batch=32, seed=0
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"[{default}]")
    parser.add_argument("--megabytes", type=float, default=80, metavar="N", help="of text at most [80]")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="train for so many steps")
    length.add_argument("--minutes", type=float, metavar="N", help="train for so long [75]")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="peak [0.001 at hidden 256, less for wider]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpoint-minutes", type=float, default=5, metavar="N", help="between saved states [5]")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    found = parser.parse_args()
    if found.smoke:
        vars(found).update(SMOKE, minutes=None)
    if found.steps is None and found.minutes is None:
        found.minutes = 75.0
    if found.learning_rate is None:
        found.learning_rate = 1e-3 * min(1.0, math.sqrt(256 / found.hidden))
    if found.hidden % found.heads or found.heads % found.kv_heads:
        parser.error(
            f"--hidden {found.hidden} must divide by --heads {found.heads}, and that by --kv-heads {found.kv_heads}"
        )
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return found


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def train_tokenizer(documents: list[str], size: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded, and 0 is the token that begins a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    assert tokenizer.token_to_id(END) == 0
    return tokenizer


def pack(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one row of ids, each begun by token 0."""
    rows = [np.array([0, *encoding.ids], np.int32) for encoding in tokenizer.encode_batch(documents)]
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def prepare(out: Path, args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Text, tokenizer and ids; taken from `out` where a run that was stopped has left them."""
    files = [out / "tokenizer.json", out / TRAIN, out / HELD_OUT]
    if not all(file.is_file() for file in files):
        training, held_out = gather(args.megabytes, args.seed)
        log(f"text: {sum(map(len, training)) / 1e6:.1f} MB in {len(training)} documents, {len(held_out)} held out")
        # A sample teaches the tokenizer as well as the whole, and its memory grows with the text.
        tokenizer = train_tokenizer(training[:: max(1, sum(map(len, training)) // 50_000_000)], args.vocab)
        np.save(files[1], pack(tokenizer, training))
        np.save(files[2], pack(tokenizer, held_out))
        tokenizer.save(str(files[0]))
    return Tokenizer.from_file(str(files[0])), np.load(files[1], mmap_mode="r"), np.load(files[2], mmap_mode="r")


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=4 * args.context,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, tie_word_embeddings=True, rms_norm_eps=1e-6,
        training_context=args.context,  # what windows of evaluation and calibration are made of
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config).to(args.device)


@functools.lru_cache(2)
def order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batch(ids: np.ndarray, step: int, args: argparse.Namespace) -> torch.Tensor:
    """Windows of `context + 1` ids, chosen by the step alone: a resumed run sees what it would have seen."""
    windows = (len(ids) - 1) // args.context
    rows = []
    for i in range(step * args.batch, (step + 1) * args.batch):
        start = int(order(args.seed, i // windows, windows)[i % windows]) * args.context
        rows.append(ids[start : start + args.context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(args.device)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    half = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else contextlib.nullcontext()
    with half:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def rate(progress: float, warm_up: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    if progress < warm_up:
        return progress / warm_up
    done = min(1.0, (progress - warm_up) / (1 - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(model: LlamaForCausalLM, ids: np.ndarray, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train to the end, or save the state and return None when asked to stop."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=args.device == "cuda")
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "device", "checkpoint_minutes")}
    step, before, losses = 0, 0.0, []
    if (args.out / STATE).is_file():
        state = torch.load(args.out / STATE, map_location=args.device, weights_only=True)
        if state["shape"] != shape:
            changed = [k for k in shape if state["shape"].get(k) != shape[k]]
            sys.exit(
                f"{args.out} holds a run with another {', '.join(changed)}: give the same options, or another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before, losses = state["step"], state["seconds"], state["losses"]
        log(f"resumed at step {step}")

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    start = saved = told = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    def save() -> None:
        state = dict(shape=shape, model=model.state_dict(), optimizer=optimizer.state_dict())
        torch.save({**state, "step": step, "seconds": seconds(), "losses": losses}, args.out / f"{STATE}.partial")
        os.replace(args.out / f"{STATE}.partial", args.out / STATE)

    model.train()
    while (progress := step / args.steps if args.steps else seconds() / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * max(rate(progress, 0.03), 1e-3)
        loss = loss_of(model, batch(ids, step, args))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at step {step}: lower --learning-rate")
        now = time.monotonic()
        if now - told > 10:
            recent = losses[-50:]
            log(f"{progress:6.1%}  step {step}  loss {sum(recent) / len(recent):.3f}  {seconds() / 60:.1f} min")
            told = now
        if stop or now - saved > 60 * args.checkpoint_minutes:
            save()
            saved = now
        if stop:
            log(f"stopped at step {step}; the same command goes on from there")
            return None
    few = max(1, min(20, len(losses) // 4))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return {"steps": step, "seconds": round(seconds(), 1), "first_loss": first, "last_loss": last}


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, ids: np.ndarray, args: argparse.Namespace, most: int = 200) -> float:
    windows = min((len(ids) - 1) // args.context, most)
    rows = [ids[i * args.context : (i + 1) * args.context + 1] for i in range(windows)]
    losses = [float(loss_of(model, torch.from_numpy(row[None].astype(np.int64)).to(args.device))) for row in rows]
    return math.exp(sum(losses) / len(losses))


def readme(figures: dict[str, Any], args: argparse.Namespace) -> str:
    rows = {
        "architecture": f"Llama: {args.layers} layers, hidden {args.hidden}, {args.heads} heads of "
        f"{args.hidden // args.heads}, {args.kv_heads} key/value heads, MLP {args.mlp}, tied embedding, "
        f"{figures['parameters'] / 1e6:.2f} M parameters, bfloat16",
        "tokenizer": f"byte-level BPE, {args.vocab} tokens, `<\\|endoftext\\|>` = 0 begins a document",
        "training": f"{figures['tokens_seen'] / 1e6:.1f} M tokens seen, of a text of "
        f"{figures['text_tokens'] / 1e6:.1f} M (standard-library source, documentation of installed packages, manual "
        f"pages), context {args.context}, AdamW, {figures['steps']} steps, {figures['seconds'] / 60:.0f} minutes on "
        f"{args.device}, seed {args.seed}",
        "float perplexity": f"{figures['evaluation_perplexity']:.2f} on the last third of `pydoc_data.topics` by name "
        f"(Python {platform.python_version()}; first 120 windows of {args.context} tokens), "
        f"{figures['held_out_perplexity']:.2f} on held-out text of its own kind",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# A language model trained by tools/train_reference_lm.py\n\n| | |\n|---|---|\n{table}\n"


def main() -> int:
    args = options()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / TRAIN).is_file():
        sys.exit(f"{args.out} is not empty and holds no stopped run: choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, ids, held_out = prepare(args.out, args)
    if tokenizer.get_vocab_size() < args.vocab:
        log(f"the text yields {tokenizer.get_vocab_size()} tokens only; the vocabulary stays {args.vocab}")
    if min(len(ids), len(held_out)) <= args.context:
        sys.exit(f"{len(ids)} tokens of text and {len(held_out)} held out are too few: raise --megabytes")
    model = make_model(args)
    figures = train(model, ids, args)
    if figures is None:
        return STOPPED

    # Saved in bfloat16 and measured as it is saved: what the README says is what a user loads.
    model = model.eval().to(torch.bfloat16)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(args.out)
    model = model.float()
    figures |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(ids),
        "tokens_seen": figures["steps"] * args.batch * args.context,
        "held_out_perplexity": held_out_perplexity(model, held_out, args),
        "evaluation_perplexity": evaluate(model, tokenizer=args.out, context=args.context, max_windows=120)[
            "perplexity"
        ],
    }
    (args.out / "README.md").write_text(readme(figures, args), encoding="utf-8")
    for name in (STATE, TRAIN, HELD_OUT):
        (args.out / name).unlink(missing_ok=True)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
