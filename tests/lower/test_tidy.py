"""Clean-up of decoder graphs: about ten nodes a layer, the same numbers, and nothing removed that is not proven."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.lower.affine import Affine, axis
from qcompiler.lower.last_logits import keep_last_logits
from qcompiler.lower.length_forms import Field, Items
from qcompiler.lower.lengths import Knowledge
from qcompiler.lower.share_cache import share_cache
from qcompiler.lower.tidy import drop_reshapes, drop_transposes, fuse_silu, tidy
from tests.artifacts import export_decoder, reference_export, scratch
from tests.lower.cached_run import NOT_RUNNABLE, Runner, assert_same_runs
from tests.models import DECODERS, MORE_DECODERS, VOCABULARY, tiny


@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_model_is_the_same_with_ten_nodes_a_layer(shared: bool, tmp_path: Path) -> None:
    model = ir.load(reference_export())
    if shared:
        share_cache(model)
    counts = tidy(model)
    assert counts["drop_attended_guards"] == counts["drop_causal_biases"] == counts["fuse_silu"] == 6
    names = Counter(node.op_type for node in model.graph)
    assert names["GroupQueryAttention"] == 6 and not {"Where", "Sigmoid", "LessOrEqual", "Not"} & names.keys()
    nodes = [node.op_type for node in model.graph]
    attentions = [at for at, name in enumerate(nodes) if name == "GroupQueryAttention"]
    assert {after - before for before, after in zip(attentions, attentions[1:], strict=False)} == {10}
    original = Runner(ir.load(reference_export()), tmp_path, "original")
    assert_same_runs(original, Runner(model, tmp_path, "tidy"), 4096, tol=1e-5)


def test_a_second_time_nothing_is_left_to_do() -> None:
    model = ir.load(reference_export())
    share_cache(model)
    tidy(model)
    before = len(model.graph)
    assert not any(tidy(model).values()) and len(model.graph) == before


def test_logits_of_the_last_tokens_only(tmp_path: Path) -> None:
    model = ir.load(reference_export())
    share_cache(model)
    assert keep_last_logits(model).changed
    original = Runner(ir.load(reference_export()), tmp_path, "original")
    assert_same_runs(original, Runner(model, tmp_path, "kept"), 4096)
    session = onnxruntime.InferenceSession(str(tmp_path / "kept.onnx"))
    feeds: dict = {"input_ids": np.arange(9)[None], "position_ids": np.arange(9)[None], "past_length": np.array([0])}
    feeds |= {v.name: np.zeros((1, 2, 9, 64), np.float32) for v in session.get_inputs() if "past_key" in v.name}
    every = session.run(["logits"], feeds | {"logits_to_keep": np.array([9])})[0]
    for keep in (1, 4, 1000):
        kept = session.run(["logits"], feeds | {"logits_to_keep": np.array([keep])})[0]
        np.testing.assert_array_equal(kept, every[:, -keep:])
    assert not keep_last_logits(model).changed


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*DECODERS, *MORE_DECODERS} - NOT_RUNNABLE))
def test_every_decoder_is_the_same_after_all_of_it(model_type: str, tmp_path: Path) -> None:
    path = export_decoder(tiny(model_type), scratch())
    model = ir.load(path)
    share_cache(model)
    tidy(model)
    keep_last_logits(model)
    assert_same_runs(Runner(ir.load(path), tmp_path, "original"), Runner(model, tmp_path, "tidy"), VOCABULARY, tol=1e-5)


# ---- what is proven, and what is not

_MASK = """
    old = Shape <start = 2, end = 3> (pk)
    new_length = Shape <start = 1, end = 2> (q)
    old0 = Squeeze(old)
    new0 = Squeeze(new_length)
    all0 = Add(old0, new0)
    key = Range(zero, all0, one)
    from_zero = Range(zero, new0, one)
    query = Add(from_zero, old0)
    query_column = Unsqueeze(query, axis1)
    allowed0 = LessOrEqual(key, query_column)
"""
_BIAS = """
    blocked = Not(allowed)
    number = Cast <to = 1> (blocked)
    plane = Mul(number, low)
    bias = Unsqueeze(plane, axes)
    both = Reshape(all0, minus)
    both32 = Cast <to = 6> (both)
    last = Sub(both32, one32)
    total = Squeeze(both32)
    a, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1> (
        q, k, v, pk, pv, last, total, , , , bias)
    allowed_number = Cast <to = 1> (allowed)
    count = ReduceSum <keepdims = 1> (allowed_number, minus)
    nowhere = Less(count, one_float)
    y = Where(nowhere, zero_float, a)
"""


def masked(allowed: str = "allowed = Identity(allowed0)", replace: tuple[str, str] = ("", "")) -> ir.Model:
    """One attention with a mask built from lengths, and the guard for queries that attend nowhere."""
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[1, new, 8] q, float[1, new, 8] k, float[1, new, 8] v, float[1, 1, past, 8] pk, float[1, 1, past, 8] pv,
           bool[new, all] given)
        => (float[1, new, 8] y, float[1, 1, all, 8] nk, float[1, 1, all, 8] nv)
        <int64 zero = {{0}}, int64 one = {{1}}, int64 four = {{4}}, int64[1] axis1 = {{1}}, int64[2] axes = {{0, 1}},
         int64[1] minus = {{-1}}, int32[1] one32 = {{1}}, float low = {{-3e38}}, float zero_float = {{0}},
         float one_float = {{1}}> {{ {_MASK} {allowed} {_BIAS} }}""".replace(*replace)
    return ir.from_onnx_text(text)


def test_a_causal_mask_and_its_guard_go() -> None:
    model = masked()
    counts = tidy(model)
    assert counts["drop_causal_biases"] == 1 and counts["drop_attended_guards"] == 1
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert all(value is None for value in attention.inputs[7:])
    assert not any(node.op_type in ("LessOrEqual", "Where", "Range") for node in model.graph)


@pytest.mark.parametrize(
    ("allowed", "bias_goes", "guard_goes"),
    [
        # A window: keys less than four positions back. It blocks more than causality, yet never the query's own.
        ("back = Sub(query_column, four)\n near = Greater(key, back)\n allowed = And(allowed0, near)", False, True),
        # Keys before the query only: the first query attends nowhere.
        ("allowed = Less(key, query_column)", False, False),
        # One position of the future allowed: causal attention blocks it as it is, and each sees itself.
        ("ahead = Add(query_column, one)\n allowed = LessOrEqual(key, ahead)", True, True),
        # A mask that somebody gives.
        ("allowed = And(allowed0, given)", False, False),
        # The mask of a window from which the query itself is excluded.
        ("back = Sub(query_column, four)\n allowed = Less(key, back)", False, False),
        # The other way round: nothing but the future.
        ("allowed = GreaterOrEqual(key, query_column)", False, True),
        ("allowed = Not(allowed0)", False, False),
    ],
)
def test_only_what_is_proven_goes(allowed: str, bias_goes: bool, guard_goes: bool) -> None:
    counts = tidy(masked(allowed))
    assert counts["drop_causal_biases"] == bias_goes
    assert counts["drop_attended_guards"] == guard_goes


@pytest.mark.parametrize(
    ("replace", "why"),
    [
        (("last = Sub(both32, one32)", "two = Add(one32, one32)\n last = Sub(both32, two)"), "other lengths"),
        (("query = Add(from_zero, old0)", "query = Identity(from_zero)"), "positions from zero"),
        (("query = Add(from_zero, old0)", "query = Sub(from_zero, old0)"), "positions before zero"),
    ],
)
def test_a_bias_about_other_positions_stays(replace: tuple[str, str], why: str) -> None:
    assert tidy(masked(replace=replace))["drop_causal_biases"] == 0, why


def test_what_is_known_of_lengths() -> None:
    model = masked()
    known = Knowledge(model.graph)
    values = {value.name: known.values.get(value) for node in model.graph for value in node.outputs}
    past, new = Affine.symbol("past"), Affine.symbol("new")
    assert values["all0"] == Items((past + new,), scalar=True)
    assert values["last"] == Items((past + new - Affine(1),))
    assert values["query"] == Field((new,), past + Affine.symbol(axis(0)))
    assert values["query_column"] == Field((new, Affine(1)), past + Affine.symbol(axis(1)))
    assert values["a"] is None


# ---- single rewrites


def small(body: str, inputs: str = "float[1, n, 8] x", output: str = "float[1, n, 8] y") -> ir.Model:
    return ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({inputs}) => ({output})
        <int64[4] heads = {{1, -1, 2, 4}}, int64[3] flat = {{1, -1, 8}}, int64[3] copied = {{0, 0, -1}},
         int64[2] rows = {{-1, 8}}, float[4] weight = {{1, 2, 3, 4}}> {{ {body} }}""")


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    shape = [n if isinstance(n, int) else 3 for n in session.get_inputs()[0].shape]
    return session.run(None, {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)})[0]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("h = Reshape(x, heads)\n z = Reshape(h, copied)\n y = Neg(z)", 0),
        ("h = Reshape(x, heads)\n z = Reshape(h, flat)\n y = Neg(z)", 0),
        ("r = Reshape(x, rows)\n h = Reshape(r, heads)\n z = Reshape(h, flat)\n y = Neg(z)", 0),
        ("z = Reshape(x, flat)\n y = Neg(z)", 0),
        ("h = Reshape(x, heads)\n y = Reshape(h, flat)", 1),
        ("h = Reshape(x, heads)\n n = Neg(h)\n y = Reshape(n, flat)", 2),
    ],
)
def test_reshapes_that_lead_back_go(body: str, left: int) -> None:
    model = small(body)
    expected = run(model)
    drop_reshapes(model.graph)
    assert sum(node.op_type == "Reshape" for node in model.graph) == left
    np.testing.assert_array_equal(run(model), expected)


def test_silu_is_one_node_whatever_the_order() -> None:
    for body in ("s = Sigmoid(x)\n y = Mul(x, s)", "s = Sigmoid(x)\n y = Mul(s, x)"):
        model = small(body)
        expected = run(model)
        assert fuse_silu(model.graph) == 1
        assert [node.op_type for node in model.graph] == ["QuickGelu"]
        assert model.graph.outputs[0].name == "y"
        np.testing.assert_allclose(run(model), expected, rtol=1e-6)
    for body in ("s = Sigmoid(x)\n t = Neg(x)\n y = Mul(t, s)", "s = Sigmoid(x)\n z = Mul(x, s)\n y = Add(z, s)"):
        assert fuse_silu(small(body).graph) == 0


@pytest.mark.parametrize(("back", "dropped"), [("0, 2, 1, 3", 1), ("0, 1, 3, 2", 0)])
def test_a_norm_of_heads_needs_no_transposes(back: str, dropped: int) -> None:
    body = f"""h = Reshape(x, heads)
        t = Transpose <perm = [0, 2, 1, 3]> (h)
        m = SimplifiedLayerNormalization <axis = -1> (t, weight)
        b = Transpose <perm = [{back}]> (m)
        y = Neg(b)"""
    model = small(body, output="float[1, d1, d2, d3] y")
    expected = run(model)
    assert drop_transposes(model.graph) == dropped
    np.testing.assert_array_equal(run(model), expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("logits = Neg(x)", "Neg .* is not a product of rows"),
        ("logits = MatMul(x, x)", "takes more than one computed value"),
        ("h = MatMul(x, w)\n logits = Neg(h)", "Neg"),
        ("h = MatMul(x, w)\n logits = Tanh(h)\n other = Neg(h)", "h, on the way to the logits, is read elsewhere too"),
        ("h = MatMul(x, w)\n logits = Mul(h, w)", "differs from row to row"),
    ],
)
def test_a_head_that_is_no_plain_product_is_left(body: str, reason: str) -> None:
    outputs = "float[1, n, 8] logits" + (", float[1, n, 8] other" if "other" in body else "")
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[1, n, 8] x) => ({outputs}) <float[8, 8] w = {{{", ".join("1" * 64)}}}> {{ {body} }}""")
    before = str(model.graph)
    result = keep_last_logits(model)
    assert not result.changed and result.reason is not None
    assert re.search(reason, result.reason), result.reason
    assert str(model.graph) == before
