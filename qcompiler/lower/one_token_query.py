"""The query of a graph that takes one token at a time, in the form that ONNX Runtime's fusions read its heads from.

    MultiHeadAttention(Reshape(x), …)  →  MultiHeadAttention(Reshape(Transpose(Transpose(x))), …),  x [batch, 1, heads, head size]

A query that nothing rotates is transposed to its heads and back. For one token onnxscript's optimizer takes both away, and the
fusion into `GroupQueryAttention` then finds no heads: the attention would stay in pieces and its cache would grow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from transformers.exporters import onnxruntime_fusions
from transformers.exporters.utils import patch_attributes

from qcompiler.lower.edit import MICROSOFT, insert_before, is_op

_SWAP = (0, 2, 1, 3)


# UPSTREAM huggingface/transformers: remove when _fuse_group_query_attention reads the heads of a query of one token
@contextlib.contextmanager
def one_token_queries() -> Iterator[None]:
    """While this is open, the fusions write such queries out before they look for `GroupQueryAttention`."""

    def spread(steps: tuple[Any, ...]) -> tuple[Any, ...]:
        at = [step for step, _ in steps].index(onnxruntime_fusions._fuse_group_query_attention)
        return (*steps[:at], (write_heads_out, ("cpu",)), *steps[at:])

    with patch_attributes([(onnxruntime_fusions, "_STEPS", spread)]):
        yield


def write_heads_out(model: ir.Model) -> None:
    """Give every `MultiHeadAttention` whose query is a plain reshape of one token's heads the two transposes again."""
    for node in list(model.graph):
        if node.op_type != "MultiHeadAttention" or node.domain != MICROSOFT or node.inputs[0] is None:
            continue
        merge = node.inputs[0].producer()
        if merge is None or not is_op(merge, "Reshape") or not _one_token(merge.inputs[0], node.attributes.get_int("num_heads")):
            continue
        heads = ir.node("Transpose", [merge.inputs[0]], attributes={"perm": _SWAP})
        back = ir.node("Transpose", [heads.outputs[0]], attributes={"perm": _SWAP})
        merged = ir.node("Reshape", [back.outputs[0], merge.inputs[1]], attributes=dict(merge.attributes))
        states = merge.inputs[0]
        assert states is not None and states.shape is not None
        heads.outputs[0].shape = ir.Shape([states.shape[axis] for axis in _SWAP])
        back.outputs[0].shape, merged.outputs[0].shape = states.shape, node.inputs[0].shape
        for made in (heads, back, merged):
            made.outputs[0].type = states.type
        insert_before(node, [heads, back, merged])
        node.replace_input_with(0, merged.outputs[0])


def _one_token(states: ir.Value | None, heads: int | None) -> bool:
    """Whether `states` are the heads of one token, [batch, 1, heads, head size]."""
    shape = None if states is None else states.shape
    return shape is not None and len(shape) == 4 and shape[1] == 1 and shape[2] == heads
