"""Runs decoder graphs of either kind of cache from numpy, without the session's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from qcompiler.lower.share_cache import CacheLayer, cache_layers

# As exported, before any pass of ours: its position bias is multiplied in bfloat16, which ONNX Runtime's CPU has not.
NOT_RUNNABLE = {"falcon_alibi"}


class Runner:
    """Feeds a graph piece by piece. A shared cache starts full of NaN, so that any read of its unfilled part shows."""

    def __init__(self, model: ir.Model, folder: Path, name: str, capacity: int = 96) -> None:
        path = folder / f"{name}.onnx"
        ir.save(model, path, external_data=f"{name}.onnx.data")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options)
        self._names = {value.name for value in self._session.get_inputs()}
        self.shared = "past_length" in self._names
        self.layers: list[CacheLayer] = cache_layers(model)
        self.length = 0
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        fill = np.nan if self.shared else 0.0
        self.cache: dict[str, np.ndarray] = {
            past: np.full([d if isinstance(d, int) else capacity * self.shared for d in shapes[past]], fill, np.float32)
            for layer in self.layers
            for past in (layer.past_key, layer.past_value)
        }

    def run(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `[new, vocabulary]` of the next tokens."""
        new = len(tokens)
        feeds = {"input_ids": tokens[None].astype(np.int64)}
        positions = np.arange(self.length, self.length + new)[None]
        extra = {"position_ids": positions, "past_length": np.array([self.length]), "logits_to_keep": np.array([new])}
        feeds |= {name: value for name, value in extra.items() if name in self._names}
        self.length += new
        pairs = [(layer.past_key, layer.present_key) for layer in self.layers]
        pairs += [(layer.past_value, layer.present_value) for layer in self.layers]
        if not self.shared:
            outputs = self._session.run(["logits", *[present for _, present in pairs]], feeds | self.cache)
            self.cache = {past: value for (past, _), value in zip(pairs, outputs[1:], strict=True)}
            return outputs[0][0]
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        values = {past: onnxruntime.OrtValue.ortvalue_from_numpy(self.cache[past]) for past, _ in pairs}
        for past, present in pairs:
            binding.bind_ortvalue_input(past, values[past])
            binding.bind_ortvalue_output(present, values[past])
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0]


def assert_same_runs(
    expected: Runner, found: Runner, vocabulary: int, pieces: tuple[int, ...] = (17, 5, *[1] * 30, 7, 1), tol: float = 0
) -> None:
    """Both give the same logits, and hold the same cache, for a prompt, single tokens and pieces in between."""
    random = np.random.default_rng(0)
    for piece in pieces:
        tokens = random.integers(0, vocabulary, piece)
        np.testing.assert_allclose(found.run(tokens), expected.run(tokens), atol=tol, rtol=0)
    for name, past in expected.cache.items():
        np.testing.assert_allclose(found.cache[name][:, :, : found.length], past[:, :, : expected.length], atol=tol)
