"""How fast an artifact runs on this machine: load, prefill and decode, with their spread."""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import onnxruntime

from qcompiler.errors import UsageError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.device import Dtype
from qcompiler.runtime.session import Session


def bench(
    path: str | os.PathLike[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    portable: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> dict[str, Any]:
    """Run a decoder `repeats` times over a random prompt, after one warm-up run.

    The prompt is cut to what the context leaves beside the new tokens; the result says how long it was.

    Returns:
        `load_seconds`; `prefill_tokens_per_second` and `decode_tokens_per_second`, each `{"median", "min", "max",
        "samples"}` with one sample a run; `milliseconds_per_token` `{"median", "p10", "p90"}` over all single steps;
        `peak_rss_bytes` of this process (None where the system does not tell); and what was run: `prompt_tokens`,
        `new_tokens`, `repeats`, `threads`, `cache`, `target`, `device`, `dtype`, `onnxruntime`, `file_bytes`.

    Raises:
        UsageError: a number is out of range, or the artifact is not a decoder.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    artifact = open_artifact(path)
    if artifact.kind not in ("decoder", "encoder-decoder"):
        raise UsageError(f"{artifact.path} is of kind {artifact.kind!r}; only decoders are measured in tokens a second")
    if artifact.room is not None:
        if new_tokens >= artifact.room:
            raise UsageError(f"new_tokens is {new_tokens}, but the model's context is {artifact.room}")
        prompt_tokens = min(prompt_tokens, artifact.room - new_tokens)
    start = time.perf_counter()
    # The cache has its final size from the start, so that no run pays for its growth.
    capacity = prompt_tokens + new_tokens
    session = Session(artifact, threads=threads, portable=portable, capacity=capacity, device=device, dtype=dtype)
    load_seconds = time.perf_counter() - start
    random = np.random.default_rng(seed)
    prompt = random.integers(0, session.vocabulary, prompt_tokens)
    _run(session, prompt, min(new_tokens, 4))
    prefill: list[float] = []
    decode: list[float] = []
    steps: list[float] = []
    for _ in range(repeats):
        prompt_seconds, step_seconds = _run(session, prompt, new_tokens)
        prefill.append(prompt_tokens / prompt_seconds)
        decode.append(new_tokens / sum(step_seconds))
        steps.extend(1000 * seconds for seconds in step_seconds)
    return {
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": spread(prefill),
        "decode_tokens_per_second": spread(decode),
        "milliseconds_per_token": {
            "median": statistics.median(steps),
            "p10": float(np.percentile(steps, 10)),
            "p90": float(np.percentile(steps, 90)),
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": threads,
        "cache": _cache_kind(session),
        "target": artifact.target,
        "device": device,
        "dtype": dtype,
        "onnxruntime": onnxruntime.__version__,
        "file_bytes": sum(info.bytes for info in artifact.files.values()),
    }


def _cache_kind(session: Session) -> str | None:
    """`static` or `growing` for what runs in torch, else what the manifest says."""
    cache = session.artifact.cache
    return getattr(session.decoder, "cache_kind", None if cache is None else cache.kind)


def _run(session: Session, prompt: np.ndarray, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds for the prompt, and for each of the following steps (greedy, whatever the tokens)."""
    session.reset()
    start = time.perf_counter()
    if session.artifact.kind == "encoder-decoder":
        session.read(prompt)
        logits = session.prefill(session.artifact.decoder_start or (0,))
    else:
        logits = session.prefill(prompt)
    prompt_seconds = time.perf_counter() - start
    step_seconds = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        logits = session.step(int(np.argmax(logits)))
        step_seconds.append(time.perf_counter() - start)
    return prompt_seconds, step_seconds


def spread(samples: list[float]) -> dict[str, Any]:
    """`median`, `min`, `max` and the samples themselves."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def peak_rss_bytes() -> int | None:
    """The most memory that this process has had at once, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
