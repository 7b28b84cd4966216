"""Give the axes that vary the names that we use for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import onnx_ir
import torch
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.ports import Port, input_port, output_port
from qcompiler.capture.prepared import Prepared
from qcompiler.errors import UnsupportedError
from qcompiler.evaluate.windows import Context

# A graph that takes so many tokens at once takes as many as any session gives it; or is right for any text.
ANY_STEP, _ANY_TEXT = 256, 1 << 17
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_TOTAL = {"past_length + length", "length + past_length"}


class FixedAxis(UnsupportedError):
    """A model's own code holds an axis at the size that it was traced with.

    Attributes:
        name: of the axis: `batch`, `length` …
    """

    def __init__(self, description: str, path: str, name: str, size: int, axes: dict[str, dict[int, str]]) -> None:
        self.name = name
        # What `fixed` can make of a model: all but caches and second texts.
        can_be = {axis for names in axes.values() for axis in names.values()} <= {"batch", "length"}
        advice = "give example inputs and dynamic_shapes to compile it for this size"
        if "input_ids" not in axes:
            advice = "name the axes that vary in dynamic_shapes, {} for none"
        elif can_be:
            advice = f"ask for a graph of one length with the recipe's allow: {{fixed_length: N}} (tokens), or {advice}"
        super().__init__(
            f"{description}: its own code holds the {name} of {path} at {size}, the size that it was traced with; expected one "
            f"that works with any: {advice}"
        )


def name_dimensions(model: onnx_ir.Model, axes: dict[str, dict[int, str]], description: str = "the model") -> None:
    """Rename the tracer's symbols everywhere in `model`:   s70, s36 + s70  ─▶  length, total_length

    Raises `UnsupportedError` where the tracer fixed an axis that varies.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        wanted = axes.get(str(value.name).removeprefix("input."), {})
        for axis, dimension in enumerate(value.shape):
            # A number may come as a symbol that is called like it.
            if axis in wanted and (size := str(getattr(dimension, "value", dimension))).isdigit():
                raise FixedAxis(description, str(value.name), wanted[axis], int(size), axes)
            if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value is not None and axis in wanted:
                names.setdefault(dimension.value, wanted[axis])
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in values:
            if value.shape is None or not any(isinstance(dimension, onnx_ir.SymbolicDim) for dimension in value.shape):
                continue
            value.shape = onnx_ir.Shape(
                _renamed(dimension.value, names)
                if isinstance(dimension, onnx_ir.SymbolicDim) and dimension.value is not None
                else dimension
                for dimension in value.shape
            )


def _renamed(expression: str, names: dict[str, str]) -> str:
    text = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), expression)
    return "total_length" if text in _TOTAL else text


def limit_lengths(module: torch.nn.Module, prepared: Prepared) -> None:
    """Note in `prepared` how many tokens a traced module with its guards is right for, where that is not any number.

    Raises `UnsupportedError` where the tracer fixed it.
    """
    if prepared.kind == "module" or prepared.step is not None or prepared.fixed is not None:
        return
    if prepared.kind == "encoder-decoder" or prepared.whole is not None:
        _limit_texts(module, prepared)
        return
    limit = ANY_STEP if prepared.kind == "decoder" else _ANY_TEXT
    found = longest(module, prepared, limit)
    if found <= 2:
        raise FixedAxis(prepared.description, "input_ids", "length", prepared.inputs["input_ids"].shape[1], prepared.axes)
    if found < limit and prepared.kind == "decoder":
        prepared.step = found
    elif found < min(_positions(prepared.module) or limit, limit):
        prepared.longest = found


def _limit_texts(module: torch.nn.Module, prepared: Prepared) -> None:
    """Note `shortest` and `longest`: of every text that goes in, the others as long as they were traced."""
    guards = getattr(module, "_guards_fn", None)
    if guards is None:
        return
    # At its last position a model's code may do something else: that is no limit of the trace.
    most = min((_positions(prepared.module) or _ANY_TEXT) - 1, _ANY_TEXT)
    traced = {name: prepared.inputs[path].shape[axis] for path, axes in prepared.axes.items() for axis, name in axes.items()}
    paths = {name: path for path, axes in prepared.axes.items() for name in axes.values()}
    for varied, size in traced.items():

        def holds(length: int, varied: str = varied) -> bool:
            return _hold(guards, prepared, traced | {varied: length})

        if not holds(size + 1) and not holds(size - 1):
            raise FixedAxis(prepared.description, paths[varied], varied, size, prepared.axes)
        last = _last(holds, size, max(most, size))
        if last < most:
            prepared.longest = min(last, prepared.longest or last)
        prepared.shortest = max(prepared.shortest, next((n + 1 for n in range(size - 1, 0, -1) if not holds(n)), 1))
    if prepared.shortest > 1 and not prepared.causal:
        # Shorter texts are filled up with tokens that nothing before them may see.
        raise FixedAxis(prepared.description, "input_ids", "length", prepared.shortest, prepared.axes)


def _hold(guards: torch.nn.Module, prepared: Prepared, sizes: dict[str, int]) -> bool:
    """Whether the trace is right for axes of these sizes."""
    tensors = get_leaf_tensors(prepared.inputs)
    shapes = [
        [sizes.get(prepared.axes[path].get(at, ""), size) for at, size in enumerate(tensor.shape)]
        for path, tensor in tensors.items()
    ]
    try:
        guards(*(torch.empty(s, dtype=t.dtype, device="meta") for s, t in zip(shapes, tensors.values(), strict=True)))
    except Exception:  # a guard that does not hold raises whatever its own code does
        return False
    return True


def _last(holds: Callable[[int], bool], first: int, most: int) -> int:
    """The largest number up to `most` at which `holds`, as it does at every one from `first` on, where it does."""
    if all(holds(n) for n in {most, max(most - 1, first), max(most // 2 + 1, first), min(first + 1, most)}):
        return most
    low, high = first, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return next((n - 1 for n in range(first + 1, low + 1) if not holds(n)), low)


def _positions(module: torch.nn.Module) -> int | None:
    """How many positions a model has, beyond which it has nothing to compute with."""
    config = getattr(module, "config", None)
    return None if config is None else Context.of_config(config).positions


def longest(module: torch.nn.Module, prepared: Prepared, limit: int) -> int:
    """The largest `length` from 2 up to `limit` at which a traced module is right, as it is at every smaller one.

    A tracer follows the model's own code for the lengths that it sees and leaves a guard wherever that code asked
    something of them, such as how many chunks there are; an ONNX graph has no guards.
    """
    guards = getattr(module, "_guards_fn", None)
    if guards is None:
        return limit
    # At its last position a model's code may do something else, and beyond it has nothing to compute with: that is no limit
    # of the trace.
    room = (_positions(prepared.module) or limit + 301) - 1
    most = max(min(limit, room - 7), 3)

    def holds(length: int) -> bool:
        pasts = (7, max(7, min(300, room - length)))
        return all(
            _hold(guards, prepared, {"length": length, "past_length": past, "total_length": past + length}) for past in pasts
        )

    if all(map(holds, (most, most - 1, most // 2 + 1, 3))):
        return limit
    return _last(holds, 2, most)


def program_ports(program: torch.export.ExportedProgram, prepared: Prepared) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an exported torch program. An input's `name` is its placeholder's, an output's its path."""
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    placeholders = _tensor_names(program.graph_signature.user_inputs, nodes)
    inputs = dict(zip(get_leaf_tensors(prepared.inputs), placeholders, strict=True))
    names: dict[str, str] = {}
    for path, placeholder in inputs.items():
        for axis, name in prepared.axes.get(path, {}).items():
            size = str(nodes[placeholder].shape[axis])
            if size.isdigit():
                raise FixedAxis(prepared.description, path, name, int(size), prepared.axes)
            names.setdefault(size, name)

    def shape(value: torch.Tensor) -> tuple[int | str, ...]:
        return tuple(size if isinstance(size, int) else _renamed(str(size), names) for size in value.shape)

    # The output's structure with a token at each leaf says at which path each result comes out.
    tokens = [torch.empty(0) for _ in program.graph_signature.user_outputs]
    structure = torch.utils._pytree.tree_unflatten(tokens, program.call_spec.out_spec)
    paths = {id(token): path for path, token in get_leaf_tensors(structure).items()}
    outputs = [
        (paths[id(token)], nodes[name])
        for token, name in zip(tokens, program.graph_signature.user_outputs, strict=True)
        if isinstance(nodes.get(name), torch.Tensor)
    ]
    return (
        [
            replace(input_port(path, shape(nodes[name]), _torch_dtype(nodes[name])), name=name)
            for path, name in inputs.items()
        ],
        [output_port(path, shape(value), _torch_dtype(value)) for path, value in outputs],
    )


def _tensor_names(names: Iterable[object], nodes: dict[str, object]) -> list[str]:
    return [name for name in names if isinstance(name, str) and isinstance(nodes.get(name), torch.Tensor)]


def _torch_dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def ports(model: onnx_ir.Model) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of an exported model, with what each means."""
    return (
        [input_port(str(value.name), _shape(value), _dtype(value)) for value in model.graph.inputs],
        [output_port(str(value.name), _shape(value), _dtype(value)) for value in model.graph.outputs],
    )


def _shape(value: onnx_ir.Value) -> tuple[int | str, ...]:
    if value.shape is None:
        return ()
    return tuple(
        dimension if isinstance(dimension, int) else dimension.value or f"axis{axis}"
        for axis, dimension in enumerate(value.shape)
    )


def _dtype(value: onnx_ir.Value) -> str:
    names = {"float": "float32", "double": "float64"}
    name = value.dtype.name.lower() if value.dtype is not None else "undefined"
    return names.get(name, name)
