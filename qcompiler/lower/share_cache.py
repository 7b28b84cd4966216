"""Key/value caches that stay in place: past and present as one buffer, with the filled length as an input.

    before   past [1, heads, length, dim] ──┬─▶ GroupQueryAttention ─▶ present [1, heads, length + new, dim]   (a copy)
                                            └─▶ Shape[2:3] ─▶ positions, masks, lengths
    after    past [1, heads, capacity, dim] ──▶ GroupQueryAttention ─▶ present [1, heads, capacity, dim]   (same buffer)
             past_length [1] int64 ───────────▶ positions, masks, lengths

ONNX Runtime's CPU kernel of `com.microsoft::GroupQueryAttention` writes the new keys and values behind the filled part
when the past input and the present output are one buffer (bound so by the caller), and copies nothing. It reads how
much is filled from `seqlens_k` and the total length, never from the buffer's size. So the rewrite is exact where the
buffer is read by such attention only, and its size only where it stands for the length; anything else keeps the
growing form, and the result says which node was in the way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompiler.lower.constants import constant
from qcompiler.lower.edit import is_attention, sweep

PAST_LENGTH = "past_length"
CAPACITY = "capacity"
_LENGTH_AXIS = 2
_CACHE_INPUT = re.compile(r"^(?P<stem>.*\.(?P<layer>\d+))\.(?:keys|key)$")
_STATE_INPUT = re.compile(r"^input\..*?\.(?P<layer>\d+)\.(?P<leaf>.+)$")


@dataclass(frozen=True)
class CacheLayer:
    """The graph inputs and outputs that carry one layer's cache, by name."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass(frozen=True)
class CacheState:
    """The graph input and output that carry another tensor of one layer's cache, by name."""

    past: str
    present: str
    layer: int


@dataclass(frozen=True)
class CacheResult:
    """How the model's cache works now.

    Attributes:
        kind: `shared` when the model was rewritten, `growing` when it was left as it is, `state` when nothing in it has
            a length.
        past_length: name of the input that says how much of the buffers is filled; None for `growing`.
        rewritten: how many reads of the past's length now read that input.
        reason: why it is still `growing`, naming the node in the way; None for `shared`.
    """

    kind: Literal["shared", "growing", "state"]
    past_length: str | None = None
    rewritten: int = 0
    reason: str | None = None


class _Refused(Exception):
    """This model keeps a growing cache; the message says why."""


def cache_layers(model: ir.Model) -> list[CacheLayer]:
    """The cache tensors of an exported decoder, in the order of its layers.

    They go by the exporter's names: `input.past_key_values.layers.3.keys` comes back as
    `output.past_key_values.layers.3.keys`, and the same with `values`. Empty for a model without a cache.
    """
    inputs = {value.name for value in model.graph.inputs}
    outputs = {value.name for value in model.graph.outputs}
    layers = []
    for name in inputs:
        match = _CACHE_INPUT.match(name) if name is not None else None
        if name is None or match is None or not name.startswith("input."):
            continue
        value = re.sub(r"key(s?)$", r"value\1", name)
        present_key, present_value = (n.replace("input.", "output.", 1) for n in (name, value))
        if value in inputs and present_key in outputs and present_value in outputs:
            layers.append((int(match["layer"]), CacheLayer(name, value, present_key, present_value)))
    return [layer for _, layer in sorted(layers, key=lambda item: (item[0], item[1].past_key))]


def cache_states(model: ir.Model) -> list[CacheState]:
    """What the cache of an exported decoder holds beside keys and values, in the order of the graph's inputs.

    Any other tensor of a cache that goes in and comes out, such as `input.cache_params.layers.0.conv_states.0`.
    """
    outputs = {value.name for value in model.graph.outputs}
    pairs = {name for layer in cache_layers(model) for name in (layer.past_key, layer.past_value)}
    states = []
    for value in model.graph.inputs:
        match = _STATE_INPUT.match(value.name or "")
        present = (value.name or "").replace("input.", "output.", 1)
        if match is not None and value.name not in pairs and present in outputs:
            states.append(CacheState(str(value.name), present, int(match["layer"])))
    return states


def share_cache(model: ir.Model, layers: Sequence[CacheLayer] | None = None) -> CacheResult:
    """Let every cache of `model` (`layers`; default those of `cache_layers`) be one buffer for past and present.

    On success the graph has one more input, `past_length` (int64, shape [1]: how many positions are filled before this
    call), and the length axis of every cache input and output is the symbol `capacity` (any size that holds the filled
    and the new positions). Otherwise nothing is changed and the result's `reason` names what was in the way.
    """
    layers = cache_layers(model) if layers is None else layers
    try:
        _check_states(model)
        reads = _length_reads(model, layers)
    except _Refused as why:
        return CacheResult("growing", reason=str(why))
    past_length = ir.Value(name=PAST_LENGTH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(past_length)
    _replace_reads(model.graph, reads, past_length)
    _declare_capacity(model.graph, layers)
    return CacheResult("shared", PAST_LENGTH, rewritten=len(reads))


def _check_states(model: ir.Model) -> None:
    """Raise `_Refused` where the cache has a tensor that grows beside the keys and values."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    for state in cache_states(model):
        shape = shapes[state.past]
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            raise _Refused(f"{state.past} grows as well, with the shape {shape}; expected keys and values only")


@dataclass(frozen=True)
class _Read:
    """A value that holds the past's length, and whether as a scalar or with shape [1]."""

    value: ir.Value
    scalar: bool


def _length_reads(model: ir.Model, layers: Sequence[CacheLayer]) -> list[_Read]:
    """Every place that reads a past's length. Raises `_Refused` where a cache is used in any other way."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    if not layers:
        raise _Refused("the graph has no cache inputs")
    if PAST_LENGTH in inputs:
        raise _Refused(f"the graph already has an input called {PAST_LENGTH!r}")
    reads: list[_Read] = []
    for layer in layers:
        attentions = []
        for name, slot in ((layer.past_key, 3), (layer.past_value, 4)):
            past = inputs[name]
            if past.shape is None or len(past.shape) != 4 or isinstance(past.shape[_LENGTH_AXIS], int):
                raise _Refused(f"{name} has the shape {past.shape}; expected [1, heads, length, dim], length free")
            for node, index in past.uses():
                if is_attention(node) and index == slot:
                    attentions.append(node)
                elif node.op_type == "Shape" and node.domain == "":
                    reads.extend(_reads_of_shape(node, name))
                else:
                    raise _Refused(f"{name} is read by {_describe(node)}, which would see the unfilled part too")
        if len(attentions) != 2 or attentions[0] is not attentions[1]:
            raise _Refused(
                f"{layer.past_key} and {layer.past_value} are read by {len(attentions)} attention inputs; expected "
                "one GroupQueryAttention that reads both"
            )
        _check_presents(attentions[0], layer)
    return reads


def _describe(node: ir.Node) -> str:
    kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{kind} ({node.name or node.outputs[0].name})"


def _check_presents(attention: ir.Node, layer: CacheLayer) -> None:
    for index, name in ((1, layer.present_key), (2, layer.present_value)):
        present = attention.outputs[index]
        if not present.is_graph_output() or present.name != name:
            raise _Refused(f"{_describe(attention)} does not give {name} directly")
        for node, _ in present.uses():
            raise _Refused(f"{name} is also read by {_describe(node)}, which would see the unfilled part too")


def _reads_of_shape(shape: ir.Node, past: str) -> list[_Read]:
    """The values behind a `Shape` of a past that are its length; the other axes stay as they are."""
    start = shape.attributes.get_int("start", 0) % 4
    end = shape.attributes.get_int("end", 4)
    end = min(end if end >= 0 else end + 4, 4)
    if not start <= _LENGTH_AXIS < end:
        return []
    if end - start == 1:
        return [_Read(shape.outputs[0], scalar=False)]
    reads = []
    for node, index in shape.outputs[0].uses():
        axes = _picked_axes(node, start, end) if index == 0 else None
        if axes is None:
            raise _Refused(f"the shape of {past} is read by {_describe(node)}, in a way that is not one of its axes")
        picked, scalar = axes
        if _LENGTH_AXIS in picked:
            if len(picked) != 1:
                raise _Refused(f"the shape of {past} is read by {_describe(node)}, its length beside other axes")
            reads.append(_Read(node.outputs[0], scalar))
    if shape.outputs[0].is_graph_output():
        raise _Refused(f"the shape of {past} is an output of the graph")
    return reads


def _picked_axes(node: ir.Node, start: int, end: int) -> tuple[list[int], bool] | None:
    """`(axes, scalar)` that a `Gather` or `Slice` with constant indices takes from `Shape[start:end]`, else None."""
    if node.domain != "" or node.op_type not in ("Gather", "Slice"):
        return None
    numbers = [array for value in node.inputs[1:] if (array := constant(value)) is not None]
    if len(numbers) != len(node.inputs) - 1:
        return None
    axes = list(range(start, end))
    if node.op_type == "Gather":
        picked = [axes[int(i)] for i in numbers[0].reshape(-1)]
        return picked, numbers[0].ndim == 0
    step = int(numbers[3][0]) if len(numbers) > 3 else 1
    return axes[int(numbers[0][0]) : int(numbers[1][0]) : step], False


def _replace_reads(graph: ir.Graph, reads: Sequence[_Read], past_length: ir.Value) -> None:
    """Put `past_length` (squeezed, once, for scalars) in the place of every read; a `Squeeze` of a read is a scalar."""
    scalar: ir.Value | None = None
    dead: list[ir.Node | None] = []

    def as_scalar() -> ir.Value:
        nonlocal scalar
        if scalar is None:
            node = ir.node("Squeeze", [past_length], name="past_length_scalar")
            scalar = node.outputs[0]
            scalar.name, scalar.shape, scalar.dtype = "past_length_scalar", ir.Shape([]), ir.DataType.INT64
            graph.insert_before(graph[0], node)
        return scalar

    for read in reads:
        if not read.scalar:
            for node, _ in list(read.value.uses()):
                if node.op_type == "Squeeze" and node.domain == "":
                    node.outputs[0].replace_all_uses_with(as_scalar())
                    dead.append(node)
        read.value.replace_all_uses_with(as_scalar() if read.scalar else past_length)
        dead.append(read.value.producer())
    for reader in dead:
        sweep(graph, reader)


def _declare_capacity(graph: ir.Graph, layers: Sequence[CacheLayer]) -> None:
    names = {
        name for layer in layers for name in (layer.past_key, layer.past_value, layer.present_key, layer.present_value)
    }
    for value in (*graph.inputs, *graph.outputs):
        if value.name in names and value.shape is not None:
            dims = list(value.shape)
            dims[_LENGTH_AXIS] = ir.SymbolicDim(CAPACITY)
            value.shape = ir.Shape(dims)
