"""The sides of one model: what each is made of, which cannot take part, and whether each computes the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench import decode_engines
from tools.bench.artifacts import Facts, artifact, kept, source_key
from tools.bench.decode_engines import KINDS, TITLES, Skip
from tools.bench.decode_process import SideError, Worker, memory_of

PEERS = (
    "ort:int4,ort:int4-g128,genai:int4,genai:int4-g128,openvino:int4,openvino:int8,"
    "llama:Q8_0,llama:Q4_0,llama:Q4_K_M,llama:Q2_K"
)
# Formats of 8 bits and more agree with the float model this well, or the side computes another model: queries and keys whose
# rows are in another order give 0.4.
LEAST_COSINE = dict.fromkeys(("F16", "float16", "Q8_0", "int8"), 0.99)
CHECKED, CHECKED_PROMPT = 40, 24  # tokens of the comparison, and how many of them at once


@dataclass(frozen=True)
class Side:
    """One model file and what runs it; `kind` is one of `KINDS`, `facts` what `artifacts.kept` returned."""

    kind: str
    variant: str
    facts: Facts

    @property
    def name(self) -> str:
        return f"{TITLES[self.kind]}{self.variant}"

    @property
    def path(self) -> str:
        return self.facts["path"]

    @property
    def data(self) -> Path:
        """The file with the weights."""
        return Path(self.path) / self.facts.get("data", "")


def ours(source: str, label: str, recipes: list[str], work: Path, again: bool, rounded: bool) -> list[Side]:
    """Our artifacts, one for each recipe."""
    return [Side("ours", name, artifact(source, label, name, "onnx", work, again, rounded)) for name in recipes]


def peers(
    source: str, label: str, names: list[str], work: Path, again: bool, rounded: bool
) -> tuple[list[Side], dict[str, str]]:
    """The peers `kind:variant` that can be made here, and of each of the others why not."""
    found, skipped = [], {}
    for kind, variant in (split(name) for name in names):
        try:
            if kind == "ort":
                facts = artifact(source, label, variant, "onnx-stock", work, again, rounded)
            elif kind == "genai":
                facts = decode_engines.module(kind).prepare(source, label, variant, work, again, rounded)
            else:
                facts = decode_engines.module(kind).prepare(_folder(source), label, variant, work, again)
            found.append(Side(kind, variant, facts))
        except Skip as reason:
            skipped[f"{TITLES[kind]}{variant}"] = str(reason)
    return found, skipped


def split(name: str) -> tuple[str, str]:
    """`llama:Q4_0` -> kind and variant."""
    kind, separator, variant = name.partition(":")
    if kind not in KINDS or kind == "ours" or not variant:
        known = ", ".join(f"{kind}:…" for kind in KINDS if kind != "ours")
        raise SystemExit(f"the peer {name!r} is none of {known}")
    return kind, variant


def _folder(source: str) -> str:
    """The checkpoint's directory."""
    if source == "reference":
        from qcompiler.data import reference_model

        return str(reference_model())
    return source


# ---- before the rounds


def reference(source: str, label: str, work: Path) -> Path:
    """The float model's logits at two places of a random text, for `Worker.cosine`."""
    made = kept(work / f"{label}-logits.npz", {"source": source_key(source)}, write_reference, _folder(source))
    return Path(made["path"])


def write_reference(path: Path, source: str) -> Facts:
    """`tokens` [n], `prompt`, and `logits` [2, vocabulary] after `prompt` tokens and after all, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, CHECKED)
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
    np.savez(path, tokens=tokens, prompt=CHECKED_PROMPT, logits=logits[[CHECKED_PROMPT - 1, CHECKED - 1]])
    return {}


def examined(side: Side, known: Path, prompt: np.ndarray, threads: int) -> dict[str, Any]:
    """What one run in a process of its own shows: `cosine` with the float model's logits, and `memory`.

    Raises `Skip` where a peer does not run or computes another model, and ends the program where one of ours does.
    """
    try:
        with Worker(side.kind, threads) as worker:
            worker.open(side.path, CHECKED)
            cosine = worker.cosine(known)
        least = LEAST_COSINE.get(side.variant, 0)
        if not cosine >= least:
            raise SideError(f"its logits are not those of this model: cosine {cosine:.4f}, expected {least} or more")
        return {"cosine": cosine, "memory": memory_of(side.kind, side.path, prompt, threads)}
    except SideError as error:
        if side.kind == "ours":
            raise SystemExit(f"{side.path}: {error}") from error
        raise Skip(str(error)) from error
