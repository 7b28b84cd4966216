"""The sides of tools/bench/decode: their processes, what peers are fed with, and that each computes the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import reference_artifact
from tools.bench import decode_engines, decode_llama, decode_process, decode_sides, models
from tools.bench.artifacts import git
from tools.bench.decode_engines import Skip
from tools.bench.decode_process import SideError, Worker

SHAPE = models.SHAPES[models.RANDOM] | dict(
    vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


class Echo:
    """Logits are one-hot at (the sum of the text so far) modulo the vocabulary; `log` has every call."""

    vocabulary = 11

    def __init__(self) -> None:
        self.text: list[int] = []
        self.log: list[tuple[str, int]] = []

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self.text = []
        self.log.append(("prefill", len(tokens)))
        return self._append(tokens.tolist())

    def step(self, token: int) -> np.ndarray:
        self.log.append(("step", token))
        return self._append([token])

    def _append(self, tokens: list[int]) -> np.ndarray:
        self.text += tokens
        return np.eye(self.vocabulary, dtype=np.float32)[sum(self.text) % self.vocabulary]

    def close(self) -> None: ...


def test_a_run_is_a_warm_up_the_prompt_and_greedy_steps_after_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_process, "PAUSE", 0)
    engine = Echo()
    result = decode_process.run(engine, np.array([1, 2, 3, 4, 5]), 2, 3)
    assert [kind for kind, _ in engine.log] == ["prefill", *["step"] * 4, "prefill", "prefill", *["step"] * 3]
    # after the first two: 1 + 2 = 3; 3 + 3 = 6; 12 mod 11 = 1
    assert engine.log[5:] == [("prefill", 5), ("prefill", 2), ("step", 3), ("step", 6), ("step", 1)]
    assert len(result["steps"]) == 3 and result["decode"] == pytest.approx(3 / sum(result["steps"]))


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_the_check_sees_both_the_prompt_and_the_steps(tmp_path: Path, wrong: int | None) -> None:
    logits = np.stack([np.eye(11)[1 + 2 + 3], np.eye(11)[(1 + 2 + 3 + 4 + 5) % 11]])
    if wrong is not None:
        logits[wrong] = np.roll(logits[wrong], 1)
    np.savez(tmp_path / "known.npz", tokens=np.array([1, 2, 3, 4, 5]), prompt=3, logits=logits)
    found = decode_process.check(Echo(), tmp_path / "known.npz")
    assert found == pytest.approx(1.0 if wrong is None else 0.0)


def known_logits(folder: Path, source: str) -> Path:
    path = folder / "logits.npz"
    decode_sides.write_reference(path, source)
    return path


def test_a_worker_runs_an_artifact_and_tells_its_memory(tmp_path: Path) -> None:
    path = str(reference_artifact())
    known = known_logits(tmp_path, decode_sides._folder("reference"))
    prompt = np.arange(32)
    with Worker("ort", 1) as worker:
        assert worker.open(path, 64) > 0
        assert worker.cosine(known) > 0.99999
        assert len(worker.run(prompt, 2, 5)["steps"]) == 5
        used = decode_process.processor_seconds(worker.pid)
        worker.close()
        with pytest.raises(SideError, match="'run' with no model open"):
            worker.run(prompt, 2, 1)
        with pytest.raises(SideError, match="nowhere does not exist"):
            worker.open("nowhere", 64)
    if os.path.exists("/proc/self/status"):
        assert used > 0
        memory = decode_process.memory_of("ort", path, prompt, 1)
        assert memory is not None
        # its weights are float32 of some 11 million bytes each of two: read, or copied, they are resident
        assert 0 <= memory["loaded_anonymous"] <= memory["loading_anonymous"] <= memory["anonymous"]
        assert memory["resident"] > (Path(path) / "model.onnx.data").stat().st_size / 2


def test_peers_that_cannot_take_part_are_skipped_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode_engines.KINDS, "llama", ("tools.bench.decode_llama", ("json", "no_such_package")))
    found, skipped = decode_sides.peers("reference", "m", ["llama:Q4_0"], tmp_path, False, False)
    assert found == [] and skipped == {"llama.cpp Q4_0": "no_such_package not installed"}
    with pytest.raises(SystemExit, match="'gguf:Q4_0' is none of ort:…, genai:…"):
        decode_sides.peers("reference", "m", ["gguf:Q4_0"], tmp_path, False, False)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(Skip, match="plain Llamas only, this is gpt2"):
        decode_engines.llama_configuration(str(tmp_path))


@pytest.mark.parametrize(("variant", "cosine", "passes"), [
    ("Q8_0", 0.42, False), ("Q8_0", float("nan"), False), ("Q8_0", 0.995, True), ("int8", 0.98, False),
    ("Q2_K", 0.42, True), ("Q2_K", -0.1, False),
])  # fmt: skip
def test_a_side_that_computes_another_model_does_not_take_part(
    monkeypatch: pytest.MonkeyPatch, variant: str, cosine: float, passes: bool
) -> None:
    class Fake:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...

        def open(self, *_: Any) -> float:
            return 1.0

        def cosine(self, _: Path) -> float:
            return cosine

    monkeypatch.setattr(decode_sides, "Worker", Fake)
    monkeypatch.setattr(decode_sides, "memory_of", lambda *_: None)
    side = decode_sides.Side("llama", variant, {"path": "/p"})
    if passes:
        assert decode_sides.examined(side, Path("known"), np.arange(4), 1) == {"cosine": cosine, "memory": None}
        return
    with pytest.raises(Skip, match=f"not those of this model: cosine {cosine:.4f}"):
        decode_sides.examined(side, Path("known"), np.arange(4), 1)
    mine = decode_sides.Side("ours", "vq2" if variant == "Q2_K" else "int8", {"path": "/p"})
    with pytest.raises(SystemExit, match="/p: its logits"):
        decode_sides.examined(mine, Path("known"), np.arange(4), 1)


# ---- llama.cpp


def test_rows_in_ggufs_order_give_the_same_scores() -> None:
    """Rotating pairs (i, i + d/2) and rotating pairs (2i, 2i + 1) of reordered rows: equal products of query and key."""
    random = np.random.default_rng(0)
    heads, width, inputs = 3, 8, 5
    angle = random.normal(size=width // 2)

    def halves(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def neighbours(x: np.ndarray) -> np.ndarray:
        a, b = x[..., ::2], x[..., 1::2]
        both = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        return np.stack(both, -1).reshape(x.shape)

    query, key = random.normal(size=(2, heads * width, inputs))
    x, y = random.normal(size=(2, inputs))
    expected = (halves((query @ x).reshape(heads, width)) * (key @ y).reshape(heads, width)).sum(-1)
    rotated = neighbours((decode_llama.interleaved(query, heads) @ x).reshape(heads, width))
    found = (rotated * (decode_llama.interleaved(key, heads) @ y).reshape(heads, width)).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_every_tensor_has_a_name_in_gguf() -> None:
    names = [f"model.layers.7.{name}.weight" for name in decode_llama.LAYER] + list(decode_llama.NAMES)
    found = [decode_llama.gguf_name(name) for name in names]
    assert len(set(found)) == len(names) == 12
    assert decode_llama.gguf_name("model.layers.7.mlp.down_proj.weight") == "blk.7.ffn_down.weight"


# ---- each peer that is installed computes the checkpoint's model


def installed(kind: str) -> Any:
    try:
        return decode_engines.module(kind)
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "variant"), [("llama", "F16"), ("llama", "Q8_0"), ("openvino", "float16")])
def test_a_peer_computes_the_same_model(tmp_path: Path, kind: str, variant: str, tied: bool) -> None:
    peer = installed(kind)
    source = str(models.random_model(tmp_path / "m", SHAPE | {"tie_word_embeddings": tied}))
    path = tmp_path / "made"
    facts = peer.write(path, source) if kind == "llama" else peer.write(path, source, variant)
    if variant == "Q8_0":
        facts = peer.quantize(tmp_path / "quantized", str(path), variant)
        path = tmp_path / "quantized"
    products = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 256) + 96 * 256
    bits = {"F16": 16, "float16": 16, "Q8_0": 8.5}[variant]
    assert facts["bytes_a_token"] == pytest.approx(products * bits / 8, rel=1e-3)
    engine = peer.Runner(str(path), 1, 64)
    cosine = decode_process.check(engine, known_logits(tmp_path, source))
    engine.close()
    assert cosine > (0.999 if variant != "Q8_0" else 0.99)


def test_genai_runs_the_stock_artifact(tmp_path: Path) -> None:
    peer = installed("genai")
    peer.write(tmp_path / "genai", str(reference_artifact()))
    engine = peer.Runner(str(tmp_path / "genai"), 1, 64)
    cosine = decode_process.check(engine, known_logits(tmp_path, decode_sides._folder("reference")))
    engine.close()
    assert cosine > 0.99999


def test_the_commit_is_named_where_there_is_one() -> None:
    assert len(git("rev-parse", "HEAD")) in (0, 40) and git("no-such-command") == ""
