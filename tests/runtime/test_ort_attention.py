"""GroupQueryAttention of our library in ONNX Runtime: in place and not, errors that name node and numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.runtime.attention_models import HEAD, HEADS, KV_HEADS, Shape, feeds, in_place, own, session

PACKED = Shape(packed=True, rotary=16, positions=True)
APART = Shape(rotary=16, bias=1)


@pytest.mark.parametrize("shape", [PACKED, APART], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_without_a_shared_buffer_the_filled_part_is_copied(shape: Shape, threads: int) -> None:
    given = feeds(shape, 40, 3)
    run = session(own(shape), True, threads)
    shared, apart = in_place(run, given), run.run(None, given)
    np.testing.assert_array_equal(apart[0], shared[0])
    for mine, theirs in zip(apart[1:], shared[1:], strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_array_equal(mine[:, :, :43], theirs[:, :, :43])


def test_a_past_without_room_gives_a_longer_present() -> None:
    """As ONNX Runtime's op does where the two are not one buffer."""
    given = feeds(PACKED, 40, 3)
    cut = {name: given[name][:, :, :40].copy() for name in ("pk", "pv")}
    run = session(own(PACKED), True)
    y, key, _ = run.run(None, given | cut)
    assert key.shape == (1, KV_HEADS, 43, HEAD)
    np.testing.assert_array_equal(y, in_place(run, given)[0])


def test_threads_change_no_bit() -> None:
    given = feeds(PACKED, 900, 1)
    results = [in_place(session(own(PACKED), True, threads), given)[0] for threads in (1, 2, 5)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_packed_is_apart() -> None:
    given = feeds(Shape(packed=True), 9, 4)
    ends = np.cumsum([HEADS * HEAD, KV_HEADS * HEAD])
    parts = dict(zip("qkv", (np.ascontiguousarray(part) for part in np.split(given["q"], ends, -1)), strict=True))
    packed = in_place(session(own(Shape(packed=True)), True), given)
    for found, expected in zip(in_place(session(own(Shape()), True), given | parts), packed, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_shapes_are_inferred() -> None:
    run = session(own(PACKED), True)
    assert [output.shape for output in run.get_outputs()] == [[1, "n", 96], [1, 2, "capacity", 16], [1, 2, "capacity", 16]]


def refused(message: str, shape: Shape = PACKED, past: int = 5, rows: int = 2, **changed: np.ndarray) -> None:
    run = session(own(shape), True)
    with pytest.raises(Exception, match=f"GroupQueryAttention node 'att': .*{message}"):
        run.run(None, feeds(shape, past, rows) | changed)


def zeros(*dims: int) -> np.ndarray:
    return np.zeros(dims, np.float32)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"last": np.array([7], np.int32)}, r"input 5 \(seqlens_k\) is 7, expected the last of the 7 positions"),
        ({"last": np.array([6, 6], np.int32)}, r"input 5 \(seqlens_k\) has shape \[2\], expected one element"),
        ({"total": np.array(1, np.int32), "last": np.array([0], np.int32)}, r"is 1 with 2 new positions"),
        ({"total": np.array(99, np.int32), "last": np.array([98], np.int32)}, r"is 99 with 2 new .* the 10 of past_key"),
        ({"total": np.array(-5, np.int32), "last": np.array([-6], np.int32)}, r"is -5 with 2 new positions"),
        ({"pos": np.array([[5]])}, r"input 9 \(position_ids\) is int64 \[1, 1\], expected int64 \[1, 2\]"),
        ({"pos": np.array([[5, 11]])}, r"the position of row 1 is 11, expected 0 to 10"),
        ({"pos": np.array([[-1, 5]])}, r"the position of row 0 is -1"),
        ({"sin": zeros(3, 8)}, r"input 8 \(sin_cache\) is float \[3, 8\], expected float \[11, 8\]"),
        ({"pv": zeros(1, 2, 9, 16)}, r"input 4 \(past_value\) has shape \[1, 2, 9, 16\], expected \[1, 2, 10, 16\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    refused(message, **changed)


def test_a_bias_that_is_too_short_is_named() -> None:
    refused(r"input 10 \(attention_bias\) has shape \[1, 1, 2, 6\], expected \[1, 1 or 6, 2, 7\]", APART, bias=zeros(1, 1, 2, 6))


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"num_heads": 5}, r"'num_heads' is 5, expected a multiple of the 2 of 'kv_num_heads'"),
        ({"kv_num_heads": 0}, r"'kv_num_heads' is 0, expected at least 1"),
        ({"local_window_size": 0}, r"'local_window_size' is 0, expected -1 \(none\) or at least 1"),
        ({"scale": float("inf")}, r"'scale' is inf"),
        ({"scale": 2}, r"'scale' is an integer, expected a float"),
    ],
    ids=str,
)
def test_attributes_are_checked_when_the_session_is_made(attributes: dict[str, Any], message: str) -> None:
    made = own(PACKED)
    (node,) = made.graph
    for name, value in attributes.items():
        node.attributes[name] = ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
    made.functions.clear()
    with pytest.raises(Exception, match=f"node 'att': attribute {message}"):
        session(made, True)


def test_one_of_key_and_value_is_refused() -> None:
    made = own(Shape())
    made.graph[0].replace_input_with(2, None)
    with pytest.raises(Exception, match=re.escape("of inputs 1 (key) and 2 (value) one is missing")):
        session(made, True).run(None, feeds(Shape(), 5, 2))
