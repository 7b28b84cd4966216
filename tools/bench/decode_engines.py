"""What runs a decoder, one interface for every side of the benchmark: ours, and the peers that are installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Skip(Exception):
    """A side cannot take part; the text says why, in a few words for the table."""


class Engine(Protocol):
    """A model in memory with the cache of one text. Neither call copies weights or compiles anything."""

    vocabulary: int

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Forget everything, then take `tokens` [n] int64 at once; the logits after the last one, float32 [vocabulary]."""

    def step(self, token: int) -> np.ndarray:
        """Append one token; the logits after it, float32 [vocabulary]."""

    def close(self) -> None:
        """Let go of memory and threads."""


# Which module runs a kind of side, and the packages that it needs; the first of them is what runs.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ours": ("tools.bench.decode_engines", ("qcompiler.runtime.session",)),
    "ort": ("tools.bench.decode_engines", ("qcompiler.runtime.session",)),
    "genai": ("tools.bench.decode_genai", ("onnxruntime_genai",)),
    "openvino": ("tools.bench.decode_openvino", ("openvino",)),
    "llama": ("tools.bench.decode_llama", ("llama_cpp", "gguf")),
}
TITLES = {"ours": "", "ort": "ONNX Runtime ", "genai": "GenAI ", "openvino": "OpenVINO ", "llama": "llama.cpp "}


def module(kind: str) -> Any:
    """The module of `kind`; it has `Runner`, and `prepare` where it is a peer. Raises `Skip` when a package is missing."""
    name, packages = KINDS[kind]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise Skip(f"{', '.join(missing)} not installed")
    return importlib.import_module(name)


class Runner:
    """Our artifacts, and those for a stock ONNX Runtime.

    Args:
        path: what `prepare` or the compiler wrote.
        threads: threads that compute.
        capacity: positions that the cache must have room for.
    """

    def __init__(self, path: str, threads: int, capacity: int) -> None:
        from qcompiler.runtime.session import Session

        self._session = Session(path, threads=threads, capacity=capacity)
        self.vocabulary = self._session.vocabulary
        self.step = self._session.step

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._session.reset()
        return self._session.prefill(tokens)

    def close(self) -> None:
        del self._session, self.step


def llama_configuration(source: str) -> dict[str, Any]:
    """The checkpoint's configuration. Raises `Skip` for anything but a plain Llama, which is all that peers are fed with."""
    config = json.loads((Path(source) / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    plain = (
        config["model_type"] == "llama" and rope.get("rope_type", "default") == "default" and not config.get("rope_scaling")
        and config["hidden_act"] == "silu" and not config.get("attention_bias") and not config.get("mlp_bias")
    )  # fmt: skip
    if not plain:
        raise Skip(f"written for plain Llamas only, this is {config['model_type']}")
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config["rope_theta"] = float(rope["rope_theta"])
    return config


def weights(source: str) -> dict[str, Any]:
    """The checkpoint's tensors by name, as torch has them."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        found |= load_file(file)
    return found
