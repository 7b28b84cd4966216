"""Caches in place: the logits of growing ones, whatever the capacity; refused where anything else reads them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.lower.share_cache import cache_layers, share_cache
from tests.artifacts import export_decoder, reference_export, scratch
from tests.lower.cached_run import NOT_RUNNABLE, Runner, assert_same_runs
from tests.models import DECODERS, MORE_DECODERS, VOCABULARY, tiny

# What ONNX Runtime's fusions cannot express as grouped-query attention keeps a growing cache.
UNFUSED = (
    "gemma2", "bloom", "falcon", "gpt_oss", "mpt", "codegen", "gpt_neo", "xglm", "deepseek_v2", "deepseek_v3", "jetmoe",
)  # fmt: skip


@functools.cache
def tiny_export(model_type: str) -> Path:
    return export_decoder(tiny(model_type), scratch())


def test_the_reference_model_runs_the_same_in_place(tmp_path: Path) -> None:
    model = ir.load(reference_export())
    result = share_cache(model)
    assert result.kind == "shared" and result.past_length == "past_length" and result.reason is None
    assert result.rewritten >= 1
    assert len(cache_layers(model)) == 6
    for value in (*model.graph.inputs, *model.graph.outputs):
        if "past_key_values" in value.name:
            assert str(value.shape) == "[1,2,capacity,64]"
    growing, shared = Runner(ir.load(reference_export()), tmp_path, "growing"), Runner(model, tmp_path, "shared")
    assert shared.shared and not growing.shared
    assert_same_runs(growing, shared, 4096)


@pytest.mark.parametrize("capacity", [62, 63, 1024])
def test_any_capacity_that_holds_the_text_gives_the_same(tmp_path: Path, capacity: int) -> None:
    model = ir.load(reference_export())
    share_cache(model)
    shared = Runner(model, tmp_path, "shared", capacity=capacity)
    assert_same_runs(Runner(ir.load(reference_export()), tmp_path, "growing"), shared, 4096)


def test_a_sliding_window_is_kept_beyond_the_window(tmp_path: Path) -> None:
    """Mistral's window of 8, against torch, token by token."""
    model = ir.load(tiny_export("mistral"))
    assert share_cache(model).kind == "shared"
    shared = Runner(model, tmp_path, "shared")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    found = np.concatenate([shared.run(tokens[:5]), *[shared.run(tokens[at : at + 1]) for at in range(5, 40)]])
    with torch.no_grad():
        expected = tiny("mistral")(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*DECODERS, *MORE_DECODERS} - NOT_RUNNABLE))
def test_every_fused_decoder_runs_the_same_in_place(model_type: str, tmp_path: Path) -> None:
    model = ir.load(tiny_export(model_type))
    result = share_cache(model)
    if model_type in UNFUSED:
        assert result.kind == "growing" and result.reason
        return
    assert result.kind == "shared", result.reason
    shared = Runner(model, tmp_path, "shared")
    assert_same_runs(Runner(ir.load(tiny_export(model_type)), tmp_path, "growing"), shared, VOCABULARY)


# ---- what is in the way

_ATTENTION = """com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1> (q, k, v, {past}, last, total)"""


def decoder(extra: str = "", outputs: str = "", past_dim: str = "past", attention: str | None = None) -> ir.Model:
    """One attention over a cache, lengths from the shape of the past, and `extra` nodes."""
    past_key, past_value = "input.past_key_values.layers.0.keys", "input.past_key_values.layers.0.values"
    present_key, present_value = (name.replace("input", "output") for name in (past_key, past_value))
    names = {past_key: "pk", past_value: "pv", present_key: "nk", present_value: "nv"}
    attention = attention or _ATTENTION.format(past="pk, pv")
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[1, new, 8] q, float[1, new, 8] k, float[1, new, 8] v, float[1, 1, {past_dim}, 8] pk,
           float[1, 1, {past_dim}, 8] pv)
        => (float[1, new, 8] y, float[1, 1, all, 8] nk, float[1, 1, all, 8] nv{outputs})
        <int64[1] two = {{2}}, int64[1] three = {{3}}, int64 axis = {{2}}, int32[1] one = {{1}}> {{
            old = Shape <start = 2, end = 3> (pk)
            new_length = Shape <start = 1, end = 2> (q)
            both = Add(old, new_length)
            both32 = Cast <to = 6> (both)
            last = Sub(both32, one)
            total = Squeeze(both32)
            y, nk, nv = {attention}
            {extra}
        }}"""
    model = ir.from_onnx_text(text)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = {short: name for name, short in names.items()}.get(value.name, value.name)
    return model


def test_a_plain_cached_attention_is_shared() -> None:
    model = decoder()
    assert share_cache(model).rewritten == 1
    assert [node.op_type for node in model.graph] == ["Shape", "Add", "Cast", "Sub", "Squeeze", "GroupQueryAttention"]
    assert model.graph.inputs[-1].name == "past_length"
    assert model.graph[1].inputs[0] is model.graph.inputs[-1]


@pytest.mark.parametrize(
    "extra",
    [
        "whole = Shape(pv)\n length = Gather(whole, axis)\n again = Add(length, length)",
        "whole = Shape(pv)\n length = Gather(whole, two)\n again = Add(length, both)",
        "whole = Shape(pv)\n length = Slice(whole, two, three)\n again = Squeeze(length)",
        "length = Shape <start = -2, end = -1> (pk)\n again = Squeeze(length)\n more = Neg(again)",
    ],
)
def test_every_way_to_read_the_length_is_replaced(extra: str) -> None:
    model = decoder(extra)
    assert share_cache(model).rewritten == 2
    past = {value for value in model.graph.inputs if "past_key_values" in value.name}
    assert all(node.op_type == "GroupQueryAttention" for value in past for node, _ in value.uses())


def test_other_axes_may_be_read() -> None:
    model = decoder("heads = Shape <start = 1, end = 2> (pk)\n more = Neg(heads)")
    assert share_cache(model).kind == "shared"
    assert any(node.op_type == "Shape" and node.inputs[0].name.endswith("keys") for node in model.graph)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: decoder("again = Concat <axis = 2> (pk, pk)"), r"layers.0.keys is read by Concat"),
        (lambda: decoder("again = Neg(nk)"), r"output.*layers.0.keys is also read by Neg"),
        (lambda: decoder("whole = Shape(pk)\n again = Neg(whole)"), "shape of input.*keys is read by Neg"),
        (lambda: decoder("part = Shape <start = 1, end = 3> (pk)\n again = Add(part, part)"), "is read by Add"),
        (lambda: decoder("whole = Shape(pk)\n part = Slice(whole, old, three)\n a = Neg(part)"), "is read by Slice"),
        (lambda: decoder(past_dim="7"), "expected .1, heads, length, dim., length free"),
        (lambda: decoder(attention=_ATTENTION.format(past="pv, pk")), "GroupQueryAttention .* would see"),
    ],
)
def test_any_other_use_is_in_the_way(model, reason: str) -> None:
    graph = model()
    before = str(graph.graph)
    result = share_cache(graph)
    assert result.kind == "growing" and result.past_length is None
    assert result.reason is not None and re.search(reason, result.reason), result.reason
    assert str(graph.graph) == before


def test_a_graph_without_a_cache_says_so() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Neg(x) }')
    assert share_cache(model).reason == "the graph has no cache inputs"
    assert cache_layers(model) == []
