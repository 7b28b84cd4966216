"""A query of one token that nothing rotates keeps the transposes that ONNX Runtime's fusions look for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers.exporters import onnxruntime_fusions

from qcompiler.lower.one_token_query import one_token_queries, write_heads_out


def model(tokens: int | str, heads: int = 4, seen: int = 4) -> ir.Model:
    """MultiHeadAttention over the merged heads of `x` [1, tokens, seen, 8]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, tokens, seen, 8])
    key = helper.make_tensor_value_info("key", TensorProto.FLOAT, [1, 5, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, tokens, 32])
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["query"]),
        helper.make_node("MultiHeadAttention", ["query", "key", "key"], ["y"], domain="com.microsoft", num_heads=heads),
    ]
    shape = numpy_helper.from_array(np.array([0, 0, -1]), "shape")
    query = helper.make_tensor_value_info("query", TensorProto.FLOAT, [1, tokens, seen * 8])
    graph = helper.make_graph(nodes, "attention", [x, key], [y], [shape], value_info=[query])
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    )


def ops(made: ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


def test_the_query_is_the_same_and_its_heads_are_found() -> None:
    made = model(1)
    write_heads_out(made)
    assert [op for op in ops(made) if op != "Reshape"] == ["Transpose", "Transpose", "MultiHeadAttention"]
    query = made.graph[-1].inputs[0]
    assert query is not None and list(query.shape or ()) == [1, 1, 32]
    states = onnxruntime_fusions._merged_heads(query)
    assert states is not None and list(states.shape or ()) == [1, 4, 1, 8]

    x = np.random.default_rng(0).standard_normal((1, 1, 4, 8)).astype(np.float32)
    proto = ir.to_proto(made)
    attention = proto.graph.node.pop()
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info(attention.input[0], TensorProto.FLOAT, [1, 1, 32]))
    (found,) = ReferenceEvaluator(onnx.load_from_string(proto.SerializeToString())).run(
        None, {"x": x, "key": np.zeros((1, 5, 32), np.float32)}
    )
    np.testing.assert_array_equal(found, x.reshape(1, 1, 32))


@pytest.mark.parametrize(
    "tokens,heads,seen",
    [(2, 4, 4), ("length", 4, 4), (1, 2, 4)],
    ids=["two tokens", "any number of tokens", "axes that are no heads"],
)
def test_what_is_not_one_token_of_heads_stays(tokens: int | str, heads: int, seen: int) -> None:
    made = model(tokens, heads, seen)
    write_heads_out(made)
    assert ops(made) == ["Reshape", "MultiHeadAttention"]


def test_the_fusions_have_their_own_steps_again_afterwards() -> None:
    before = onnxruntime_fusions._STEPS
    with pytest.raises(KeyError), one_token_queries():
        assert (write_heads_out, ("cpu",)) in onnxruntime_fusions._STEPS
        raise KeyError
    assert onnxruntime_fusions._STEPS is before
