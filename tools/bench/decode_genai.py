"""ONNX Runtime GenAI: our artifact for a stock ONNX Runtime, with the inputs that it feeds and a configuration for it.

Its models know how long the text is from `attention_mask`; ours from `past_length`, and keep as many logits as
`logits_to_keep` says. Two nodes in front of the same graph, over the same data file, turn the one into the other.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.runtime.artifact import Artifact, open_artifact
from tools.bench.artifacts import Facts, artifact, kept
from tools.bench.decode_engines import Skip

SHARED = "past_present_share_buffer"


def prepare(source: str, label: str, variant: str, work: Path, again: bool, rounded: bool) -> Facts:
    """The `onnx-stock` artifact of the recipe `variant`, adapted."""
    stock = artifact(source, label, variant, "onnx-stock", work, again, rounded)
    key = {"artifact": json.loads((Path(stock["path"]) / "manifest.json").read_text())["manifest_sha256"]}
    made = kept(work / f"{label}-{variant}-genai", key, write, stock["path"], again=again)
    return made | {name: stock[name] for name in ("bytes_a_token", "file_bytes", "data")}


def write(path: Path, source: str) -> Facts:
    """The graph with GenAI's inputs, its data file (linked, not copied, where the file system can) and `genai_config.json`."""
    import onnx
    from onnx import TensorProto, helper

    opened = open_artifact(source)
    roles = {info.role: info.name for info in opened.inputs}
    if unknown := roles.keys() - {"tokens", "positions", "past_length", "logits_to_keep", "past_key", "past_value"}:
        raise Skip(f"its decoder models have nothing to feed to {', '.join(sorted(unknown))}")
    if opened.cache is None or opened.cache.kind != "shared" or opened.cache.states:
        raise Skip("adapted to a shared cache of keys and values only")
    model = onnx.load(Path(source) / "model.onnx", load_external_data=False)
    graph = model.graph
    replaced = {roles[role] for role in ("past_length", "logits_to_keep") if role in roles}
    inputs = [value for value in graph.input if value.name not in replaced]
    inputs.insert(1, helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total_length"]))
    del graph.input[:]
    graph.input.extend(inputs)
    nodes = [
        helper.make_node("Shape", ["attention_mask"], ["genai.total"], start=1, end=2),
        helper.make_node("Shape", [roles["tokens"]], ["genai.new"], start=1, end=2),
        helper.make_node("Sub", ["genai.total", "genai.new"], [roles["past_length"]]),
    ]
    if "logits_to_keep" in roles:
        nodes.append(helper.make_node("Constant", [], [roles["logits_to_keep"]], value_ints=[1]))
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    logits = next(value for value in graph.output if value.name == "logits")
    # A fixed 1 tells GenAI that logits are those of the last token; otherwise it makes room for those of every one.
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    path.mkdir()
    onnx.save(model, path / "model.onnx")
    data = path / "model.onnx.data"
    try:
        os.link(Path(source) / "model.onnx.data", data)
    except OSError:
        shutil.copyfile(Path(source) / "model.onnx.data", data)
    config = json.loads((Path(source) / "config.json").read_text())
    (path / "genai_config.json").write_text(json.dumps(configuration(opened, config, roles), indent=1))
    return {}


def configuration(opened: Artifact, config: dict[str, Any], roles: dict[str, str]) -> dict[str, Any]:
    """What GenAI must know of the graph; threads and length are put in when it is opened."""
    assert opened.cache is not None
    layers = opened.cache.layers
    first = layers[0]
    vocabulary = next(info for info in opened.outputs if info.role == "logits").shape[-1]

    def pattern(what: str) -> str:
        name = getattr(first, what).replace(".0.", ".%d.")
        if any(getattr(layer, what) != name % index for index, layer in enumerate(layers)):
            raise Skip(f"its names of a cache follow one pattern, {getattr(first, what)!r} and the others do not")
        return name

    inputs = {"input_ids": roles["tokens"], "attention_mask": "attention_mask"}
    if "positions" in roles:
        inputs["position_ids"] = roles["positions"]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []}, "filename": "model.onnx",
        "head_size": first.head_dim, "hidden_size": config["hidden_size"], "num_hidden_layers": len(layers),
        "num_attention_heads": config["num_attention_heads"], "num_key_value_heads": first.heads,
        "inputs": inputs | {"past_key_names": pattern("past_key"), "past_value_names": pattern("past_value")},
        "outputs": {
            "logits": "logits", "present_key_names": pattern("present_key"), "present_value_names": pattern("present_value"),
        },
    }  # fmt: skip
    return {
        "model": {
            "type": "llama", "decoder": decoder, "vocab_size": vocabulary, "context_length": opened.context,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,  # of no consequence: tokens are given, not generated
        },
        "search": {SHARED: True, "do_sample": False, "num_beams": 1, "batch_size": 1},
    }  # fmt: skip


class Runner:
    """See `decode_engines.Engine`: one generator a text; a step appends the token and takes the logits."""

    def __init__(self, path: str, threads: int, capacity: int) -> None:
        import onnxruntime_genai as genai

        self._genai: Any = genai
        config = genai.Config(path)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        known = json.loads((Path(path) / "genai_config.json").read_text())["model"]
        self.vocabulary, self._capacity = known["vocab_size"], capacity
        self._begin()

    def _begin(self) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._capacity, **{SHARED: True})
        self._generator = self._genai.Generator(self._model, parameters)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        if self._generator.token_count():
            self._begin()
        return self._append(tokens)

    def step(self, token: int) -> np.ndarray:
        return self._append(np.array([token]))

    def _append(self, tokens: np.ndarray) -> np.ndarray:
        self._generator.append_tokens(tokens.astype(np.int32)[None])
        return self._generator.get_logits().reshape(-1)

    def close(self) -> None:
        del self._generator, self._model
