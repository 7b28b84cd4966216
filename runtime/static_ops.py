"""What the ops of an exported graph do along an axis of cached positions, some of which are not filled yet.

Names are those of ATen overload packets. An op that is on no list is one of which nothing is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

# Every element of the result follows from the elements at its own place.
POINTWISE = frozenset(
    """abs add bitwise_and bitwise_not bitwise_or bool clamp clamp_max clamp_min cos div dropout eq exp float floor floor_divide
    ge gelu gt isinf isnan le log logical_and logical_not logical_or lt masked_fill maximum minimum mul ne neg pow relu remainder
    rsqrt rsub sigmoid sign silu sin sqrt sub tanh to _to_copy type_as where __and__ __or__ detach alias add_ div_ mul_ sub_
    masked_fill_""".split()
)

# The result holds the same elements in another order or shape.
LAYOUT = frozenset(
    """_unsafe_view alias chunk clone contiguous detach expand expand_as flatten getitem lift_fresh_copy movedim permute
    repeat repeat_interleave reshape select slice split split_with_sizes squeeze swapaxes t transpose unflatten unsqueeze view
    view_as""".split()
)

# Tensors made from sizes.
FACTORIES = frozenset("arange empty full new_empty new_full new_ones new_zeros ones zeros".split())

# Of each factory and layout op: the position of the argument that holds sizes.
SIZES_AT = {
    "_unsafe_view": 1, "empty": 0, "expand": 1, "full": 0, "new_empty": 1, "new_full": 1, "new_ones": 1, "new_zeros": 1,
    "ones": 0, "reshape": 1, "view": 1, "zeros": 0, "unflatten": 2, "repeat": 1,
}  # fmt: skip

# Each row of the result, along its last axis, follows from the same row of the input.
ROW_BY_ROW = frozenset("layer_norm linear linear_mixed linear_nbit linear_vq native_layer_norm rms_norm".split())

# Sums over the last axis of the first factor; position of the two factors.
PRODUCTS = {"baddbmm": (1, 2), "bmm": (0, 1), "matmul": (0, 1), "mm": (0, 1)}

# Each element of the result follows from those before it on the axis.
PREFIX = frozenset(["cumsum"])

SOFTMAX = frozenset(["softmax", "_softmax"])
# (query, key, value, mask …), whatever else they take.
ATTENTION = frozenset(["attention", "scaled_dot_product_attention"])

# Checks of what the trace saw, with no result.
CHECKS = frozenset(["_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size"])


def packet(node: Node) -> str:
    """The name of a node's op, without its overload; empty for what is no op."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "overloadpacket", node.target)
    text = str(getattr(name, "__name__", name)).rpartition(".")[2]
    if text in ("max", "min") and getattr(node.target, "_overloadname", "") == "other":
        return f"{text}imum"
    return text
