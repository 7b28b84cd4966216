"""Our attention in place of ONNX Runtime's: which nodes, why others are not, and the body that a stock runtime executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.lower.own_attention import INPUTS, use_own_attention
from qcompiler.lower.share_cache import CacheResult
from qcompiler.ops.onnx_ops import attach_bodies
from qcompiler.report.inspect_onnx import inspect_onnx
from qcompiler.runtime.library import library_path
from tests.runtime import attention_models
from tests.runtime.attention_models import SHARED, Shape, feeds, in_place, model, own, session

PACKED = Shape(packed=True, rotary=16, positions=True)


def ops(found: ir.Model) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in found.graph]


def test_the_node_is_replaced_with_all_that_it_had() -> None:
    found = model(PACKED)
    (node,) = found.graph
    before = [value and value.name for value in node.inputs]
    result = use_own_attention(found, SHARED)
    assert result.matched == {"packed-rotary-positions": 1} and result.skipped == []
    (node,) = found.graph
    assert (node.domain, node.op_type, node.name) == ("ai.qcompiler", "GroupQueryAttention", "att")
    assert [value and value.name for value in node.inputs] == before
    assert [value.name for value in node.outputs] == [value.name for value in found.graph.outputs] == ["y", "nk", "nv"]
    assert node.attributes.get_int("num_heads") == 6 and node.attributes.get_int("do_rotary") == 1
    (function,) = found.functions.values()
    assert {inner.domain for inner in function} == {""} and function.overload == node.overload


def test_nodes_of_one_variant_share_a_body_and_others_do_not() -> None:
    found = model(PACKED)
    (first,) = found.graph
    for name, count in (("again", 10), ("plain", 7)):  # the second without what is rotated
        attributes = {key: a.value for key, a in first.attributes.items()} | {"do_rotary": int(count == 10)}
        found.graph.append(
            ir.node(first.op_type, first.inputs[:count], attributes, domain=first.domain, num_outputs=3, name=name)
        )
    result = use_own_attention(found, SHARED)
    assert result.matched == {"packed": 1, "packed-rotary-positions": 2}
    assert {key[2] for key in found.functions} == {"packed", "packed-rotary-positions"}


@pytest.mark.parametrize(
    "attributes, reason",
    [
        ({"softcap": 30.0}, "attribute softcap = 30.0"),
        ({"smooth_softmax": 1}, "attribute smooth_softmax = 1"),
        ({"causal": 0}, "attribute causal = 0"),
        ({"kv_cache_bit_width": 8}, "attribute kv_cache_bit_width = 8"),
    ],
)
def test_what_our_op_does_not_have_stays(attributes: dict[str, Any], reason: str) -> None:
    found = model(PACKED, **attributes)
    result = use_own_attention(found, SHARED)
    assert result.matched == {} and result.skipped == [{"node": "att", "reason": reason}]
    assert ops(found) == ["com.microsoft::GroupQueryAttention"] and not found.functions


def test_defaults_that_are_spelled_out_do_not_matter() -> None:
    found = model(PACKED, softcap=0.0, smooth_softmax=0, causal=1)
    assert use_own_attention(found, SHARED).matched
    assert not {"softcap", "smooth_softmax", "causal"} & found.graph[0].attributes.keys()


def test_another_input_stays() -> None:
    found = model(PACKED)
    (node,) = found.graph
    sink = ir.Value(name="sink", shape=ir.Shape([6]), type=ir.TensorType(ir.DataType.FLOAT))
    found.graph.inputs.append(sink)
    node.resize_inputs(12)
    node.replace_input_with(11, sink)
    assert use_own_attention(found, SHARED).skipped[0]["reason"] == "input 11 (sink)"


def test_a_cache_that_grows_stays() -> None:
    found = model(PACKED)
    result = use_own_attention(found, CacheResult("growing", reason="Concat reads it"))
    assert result.skipped == [{"node": "att", "reason": "the cache is not shared: Concat reads it"}]


def test_a_cache_of_another_type_stays() -> None:
    found = model(PACKED)
    next(v for v in found.graph.inputs if v.name == "pk").type = ir.TensorType(ir.DataType.FLOAT16)
    assert "FLOAT16" in use_own_attention(found, SHARED).skipped[0]["reason"]


def test_a_recipe_may_leave_it() -> None:
    found = model(PACKED)
    result = use_own_attention(found, SHARED, wanted=False)
    assert result.skipped == [{"node": "att", "reason": "the recipe says own_attention: false"}]


def test_bodies_of_weights_may_be_attached_again() -> None:
    found = model(PACKED)
    use_own_attention(found, SHARED)
    assert attach_bodies(found) == {} and len(found.functions) == 1


@pytest.mark.parametrize(
    "shape",
    [
        PACKED,
        Shape(),
        Shape(rotary=16, bias=1),
        Shape(packed=True, rotary=16, positions=True, bias=6),
        Shape(window=9, scale=0.4),
        Shape(packed=True, rotary=16, interleaved=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("past, rows", [(0, 1), (0, 20), (7, 1), (33, 5)])
def test_the_body_is_our_op_to_the_bit_and_near_onnx_runtime_s(shape: Shape, past: int, rows: int) -> None:
    given = feeds(shape, past, rows)
    body, library = (in_place(session(own(shape), library=library), given) for library in (False, True))
    for found, expected, stock in zip(body, library, in_place(session(model(shape)), given), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found - stock).max() <= 1e-5


@pytest.mark.parametrize("heads, kv_heads, head", [(8, 2, 64), (2, 2, 80), (3, 1, 128), (2, 1, 256), (4, 2, 40)])
@pytest.mark.parametrize("past, rows, threads", [(511, 2, 1), (700, 1, 2), (100, 70, 4)])
def test_the_body_is_our_op_for_other_heads(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, head: int, past: int, rows: int, threads: int
) -> None:
    for name, value in (("HEADS", heads), ("KV_HEADS", kv_heads), ("HEAD", head)):
        monkeypatch.setattr(attention_models, name, value)
    shape = Shape(packed=True, rotary=head // 4 * 2, positions=True, window=300)
    given = feeds(shape, past, rows)
    body, library = (in_place(session(own(shape), library, threads), given) for library in (False, True))
    for found, expected in zip(body, library, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_body_with_positions_that_a_bias_forbids() -> None:
    """A block of which nothing is seen, a row that sees nothing, and a bias that is not a number."""
    shape = Shape(bias=1)
    given = feeds(shape, 270, 3)
    given["bias"][0, 0, 0, :140] = given["bias"][0, 0, 1] = -np.inf
    given["bias"][0, 0, 2, 5] = np.nan
    body, library = (in_place(session(own(shape), library), given)[0] for library in (False, True))
    np.testing.assert_array_equal(body, library)
    assert np.isfinite(body[0, 0]).all() and np.isnan(body[0, 1:]).all()


def test_inspect_names_what_it_is_given(tmp_path: Path) -> None:
    found = model(PACKED)
    use_own_attention(found, SHARED)
    ir.save(found, tmp_path / "model.onnx")
    document = inspect_onnx(tmp_path / "model.onnx")
    (node,) = document.data["nodes"]
    assert (node["op"], node["shape"], node["format"]) == ("GroupQueryAttention", None, None)
    assert node["edges"] == ["packed", "rotary", "positions"] and node["attributes"]["num_heads"] == 6
    (table,) = (block for block in document.blocks if getattr(block, "title", "") == "nodes of ours")
    assert table.rows[0][2] is None


def test_without_body_and_library_it_is_refused(tmp_path: Path) -> None:
    own = model(PACKED)
    use_own_attention(own, SHARED)
    own.functions.clear()
    with pytest.raises(Exception, match=r"ai\.qcompiler"):
        session(own)


def test_every_input_of_onnx_runtime_s_op_that_we_name_has_its_name() -> None:
    """In the order of its schema: the names are those of the body, and of error messages."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    (schema,) = (s for s in state.get_all_operator_schema() if s.name == "GroupQueryAttention")
    assert tuple(i.name for i in schema.inputs)[: len(INPUTS)] == INPUTS


def test_the_library_has_it() -> None:
    assert library_path().is_file() and "CPUExecutionProvider" in ort.get_available_providers()
