"""A float32 program that computes in float16 or bfloat16: products and attention in the short type, sums and norms in float32.

    before   linear_nbit(x float32)      pow(x) ─▶ mean ─▶ rsqrt ─▶ mul(x) ─▶ linear(·, W)       embedding_nbit ─▶ float32
    after    linear_nbit(to(x, short))   pow(to(x, float32)) ─▶ … ─▶ mul ─▶ linear(to(·, short), W short)
                                                                                  embedding_nbit ─▶ to(·, short)

What a trace made explicit stays as it is: a cast to float32, a table of positions, the weight of a norm. In between, results are
of the widest type that goes into them, as torch has it. Caches of keys and values are of the short type; recurrent states stay
float32, where the error of one step is in every later one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from qcompiler.ops.spec import SPECS
from qcompiler.runtime.artifact import Artifact, TensorInfo
from qcompiler.runtime.static_ops import ATTENTION, packet

aten = torch.ops.aten

# Factors are of one type, and a sum inside is a longer one's anyway.
PRODUCTS = frozenset(
    """addmm baddbmm bmm conv1d conv2d conv_transpose1d convolution einsum embedding index_copy linear matmul mm
    scaled_dot_product_attention""".split()
)
# Squares, exponentials and sums overflow float16, and lose small terms in both.
WIDE = frozenset(
    """_softmax cos cumprod cumsum exp expm1 group_norm layer_norm linalg_vector_norm log log1p log_softmax logcumsumexp
    logsumexp mean native_layer_norm norm pow prod reciprocal rms_norm rsqrt sin softmax softplus sqrt square std sum var
    var_mean""".split()
)
# What is written must be of the type of what it is written into.
WRITES = frozenset("copy_ index_add index_copy_ index_put index_put_ masked_scatter scatter scatter_add select_scatter".split())
_EMBEDDINGS = ("embedding_nbit", "embedding_vq")
_STREAM = ("x",)  # of a linear op of ours; a residual may be longer than x, everything else is as the op declares it


def narrow(module: GraphModule, dtype: torch.dtype, artifact: Artifact) -> None:
    """Let an artifact's loaded program compute in `dtype`, in place.

    Its float inputs are then of `dtype`, states excepted (see `input_dtype`); so are the caches that come out.
    """
    _Narrow(module, dtype, artifact).run()


def input_dtype(info: TensorInfo, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type of an input of a narrowed program, `stored` before."""
    return dtype if stored == torch.float32 and info.role != "past_state" else stored


class _Narrow:
    def __init__(self, module: GraphModule, dtype: torch.dtype, artifact: Artifact) -> None:
        self.module, self.graph, self.dtype, self.artifact = module, module.graph, dtype, artifact
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.largest = torch.finfo(dtype).max

    def run(self) -> None:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        inputs = dict(zip(placeholders, self.artifact.inputs, strict=True))
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                stored = node.meta["val"].dtype
                self._becomes(node, input_dtype(inputs[node], stored, self.dtype))
            elif node.op == "get_attr":
                self._weight(node)
            elif node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                self._results(node)
        self.graph.lint()
        self.module.recompile()

    def _visit(self, node: Node) -> None:
        name = packet(node)
        if name == "_assert_tensor_metadata":
            self.graph.erase_node(node)
            return
        if _is_ours(node):
            self._ours(node, name)
            return
        floats = [source for source in node.all_input_nodes if _is_float(source)]
        past = name == "cat" and any(source.op == "placeholder" for source in floats)
        if name in PRODUCTS or past:
            self._cast_inputs(node, self.dtype)
            if name in ATTENTION:
                self._bound_mask(node)
            self._becomes(node, self.dtype)
        elif name in WIDE or self._beyond(node):
            self._cast_inputs(node, torch.float32)
            self._becomes(node, torch.float32)
        elif name in WRITES:
            target: Any = node.args[0]
            if _is_float(target):
                self._cast_inputs(node, target.meta["val"].dtype)
                self._becomes(node, target.meta["val"].dtype)
        elif name in ("type_as", "to") and len(node.args) > 1 and isinstance(node.args[1], Node):
            self._becomes(node, node.args[1].meta["val"].dtype)
        elif floats and node.kwargs.get("dtype") is None and not any(isinstance(arg, torch.dtype) for arg in node.args):
            if name.endswith("_") and not name.endswith("__"):
                floats = floats[:1]
            # As torch has it: a number in a tensor of no axes widens nothing.
            with_axes = [s for s in floats if _dims(s) > 0] or floats
            wide = any(_dtype(s) == torch.float32 for s in with_axes)
            self._becomes(node, torch.float32 if wide else self.dtype)

    def _ours(self, node: Node, name: str) -> None:
        """Linear ops give the type of x; lookups give float32, which is cast at once."""
        if name in _EMBEDDINGS:
            with self.graph.inserting_after(node):
                short = self.graph.call_function(aten.to.dtype, (node, self.dtype))
            node.replace_all_uses_with(short, lambda user: user is not short)
            short.meta["val"] = node.meta["val"].to(self.dtype)
            return
        if name in ATTENTION:
            self._cast_inputs(node, self.dtype)
            self._bound_mask(node)
            self._becomes(node, self.dtype)
            return
        spec = SPECS.get(name)
        named = [i.name for i in spec.inputs] if spec is not None else []
        node.args = tuple(
            self._cast(arg, self.dtype, node)
            if isinstance(arg, Node) and _is_float(arg) and at < len(named) and named[at] in _STREAM
            else arg
            for at, arg in enumerate(node.args)
        )
        self._becomes(node, self.dtype)

    def _weight(self, node: Node) -> None:
        """A weight that only products read is kept in the short type; others say by their type how they are to be used."""
        users = [user for user in node.users if not (user.op == "call_function" and packet(user) == "_assert_tensor_metadata")]
        if not _is_float(node) or not users or any(_is_ours(user) or packet(user) not in PRODUCTS for user in users):
            return
        owner, _, name = str(node.target).rpartition(".")
        holder = self.module.get_submodule(owner)
        value = getattr(holder, name)
        if value.dtype != torch.float32:
            return
        short = value.detach().to(self.dtype)
        if isinstance(value, torch.nn.Parameter):
            setattr(holder, name, torch.nn.Parameter(short, requires_grad=False))
        else:
            setattr(holder, name, short)
        for other in self.graph.nodes:
            if other.op == "get_attr" and other.target == node.target:
                self._becomes(other, self.dtype)

    def _bound_mask(self, node: Node) -> None:
        """The lowest float32 is minus infinity in float16, of which a whole row would give NaN."""
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, Node) or not _is_float(mask) or mask.target is not aten.to.dtype:
            return
        source: Any = mask.args[0]
        with self.graph.inserting_before(mask):
            bounded = self.graph.call_function(aten.clamp.default, (source, -self.largest))
        bounded.meta["val"] = source.meta["val"]
        mask.args = (bounded, *mask.args[1:])

    def _results(self, output: Node) -> None:
        """What goes in again goes out as it comes in."""
        wanted = {"present_key": self.dtype, "present_value": self.dtype, "present_state": torch.float32}
        roles = [info.role for info in self.artifact.outputs]
        leaves, spec = _pytree.tree_flatten(output.args)
        cast = [
            self._cast(leaf, wanted[role], output) if isinstance(leaf, Node) and role in wanted else leaf
            for leaf, role in zip(leaves, roles, strict=True)
        ]
        output.args = _pytree.tree_unflatten(cast, spec)

    def _beyond(self, node: Node) -> bool:
        """Whether it computes with a number that the short type does not have."""
        numbers = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, float)]
        return any(self.largest < abs(number) < float("inf") for number in numbers)

    def _cast_inputs(self, node: Node, dtype: torch.dtype) -> None:
        node.args = map_arg(node.args, lambda source: self._cast(source, dtype, node))
        node.kwargs = map_arg(node.kwargs, lambda source: self._cast(source, dtype, node))

    def _cast(self, source: Node, dtype: torch.dtype, before: Node) -> Node:
        if not _is_float(source) or _dtype(source) == dtype:
            return source
        key = source, dtype
        if key not in self.casts:
            with self.graph.inserting_before(before):
                made = self.graph.call_function(aten.to.dtype, (source, dtype))
            made.meta["val"] = source.meta["val"].to(dtype)
            self.casts[key] = made
        return self.casts[key]

    def _becomes(self, node: Node, dtype: torch.dtype) -> None:
        """Record the type of a node's result, where that is float."""
        val = node.meta.get("val")
        change = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in _FLOATS else t  # noqa: E731
        if isinstance(val, (tuple, list)):
            node.meta["val"] = type(val)(change(t) for t in val)
        elif isinstance(val, torch.Tensor):
            node.meta["val"] = change(val)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", None) == "qcompiler"


def _dtype(node: Node) -> torch.dtype | None:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) else None


def _dims(node: Node) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, torch.Tensor) else 1


def _is_float(node: Any) -> bool:
    return isinstance(node, Node) and _dtype(node) in _FLOATS
