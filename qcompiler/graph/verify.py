"""What must hold of a graph after each stage."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Literal

import torch
from torch.fx import Node

from qcompiler.errors import GateError
from qcompiler.graph.constants import attribute, has_attribute, storage_key
from qcompiler.graph.graph import Graph, Site
from qcompiler.ops.experts_linear import EXPERTS_LINEAR
from qcompiler.ops.experts_linear import NAMESPACE as EXPERTS_NAMESPACE

Stage = Literal["captured", "normalised", "analysed", "rewritten"]
STAGES: tuple[Stage, ...] = ("captured", "normalised", "analysed", "rewritten")

aten = torch.ops.aten
# Ours appear with the rewrite and no earlier.
_OUR_NAMESPACE = "qcompiler"
# Stands in the graph within the stage `observe` and at no stage's end.
_OBSERVER = "qcompiler.observe.default"
# `transformers` has an op of its own for products with many experts' weights, and so have we (`experts_linear`).
_NAMESPACES = frozenset({"aten", "prims", "transformers", EXPERTS_NAMESPACE})
_ASSERTING = ("_assert", "sym_constrain_range")
_FAKE_QUANTIZED = ("fake_quantize", "quantize_per", "dequantize", "quantized_decomposed", "fake_quant")
_PYTHON_MODULES = frozenset({"_operator", "operator", "math", "torch"})


def verify(graph: Graph, stage: Stage) -> None:
    """Check the graph's targets and invariants after a stage.

    Raises:
        GateError: with the node, the rule that it breaks and the stage.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; expected one of {', '.join(STAGES)}")
    try:
        graph.module.graph.lint()
    except RuntimeError as error:
        raise GateError(f"after stage {stage!r} the graph is malformed: {error}") from error
    for node in graph.nodes:
        for problem in _problems(graph, node, stage):
            raise GateError(f"after stage {stage!r}, node {node.name} ({node.target}): {problem}")
    if STAGES.index(stage) >= STAGES.index("analysed"):
        for site, problem in _site_problems(graph):
            raise GateError(f"after stage {stage!r}, site {site.name} (node {site.node.name}): {problem}")


def _problems(graph: Graph, node: Node, stage: Stage) -> Iterator[str]:
    if node.op == "get_attr":
        yield from _constant_problems(graph, node)
    elif node.op == "call_method":
        yield "methods are not allowed in a captured graph"
    elif node.op == "call_module" and (stage != "captured" or node.target != "_guards_fn"):
        yield "module calls are not allowed" if node.target != "_guards_fn" else "guards must be stripped"
    elif node.op == "call_function":
        yield from _target_problems(node, stage)
        if node.target is aten.linear.default and stage != "captured":
            yield from _linear_problems(node)
        if node.target is EXPERTS_LINEAR:
            yield from _experts_problems(node)


def _target_problems(node: Node, stage: Stage) -> Iterator[str]:
    target = node.target
    name = str(target)
    if any(word in name for word in _FAKE_QUANTIZED):
        yield "fake quantization is not allowed at any stage"
    if not isinstance(target, torch._ops.OpOverload):
        module = getattr(target, "__module__", None)
        if target not in vars(operator).values() and module not in _PYTHON_MODULES:
            yield f"expected an operator or a Python scalar function, found {target!r}"
        return
    if target.namespace == _OUR_NAMESPACE:
        if name == _OBSERVER:
            yield "an observer is left; calibrate_ranges must follow place_observers at once and select every site that reads it"
        elif stage != "rewritten":
            yield f"ops of {_OUR_NAMESPACE} appear in stage 'rewritten' only"
    elif stage != "captured" and target.namespace not in _NAMESPACES:
        yield f"namespace {target.namespace!r} is not allowed; expected one of {', '.join(sorted(_NAMESPACES))}"
    if stage != "captured" and any(name.startswith(f"aten.{word}") for word in _ASSERTING):
        yield "assertions must be stripped"


def _constant_problems(graph: Graph, node: Node) -> Iterator[str]:
    name = str(node.target)
    if not has_attribute(graph.module, name):
        yield "there is no such constant"
        return
    constant, described = attribute(graph.module, name), node.meta.get("val")
    if isinstance(constant, torch.Tensor) and isinstance(described, torch.Tensor):
        found, expected = tuple(constant.shape), tuple(described.shape)
        # A weight may be stored narrower than the graph computes: `Graph.constant` widens it.
        narrow = described.dtype is torch.float32 and constant.dtype in (torch.float16, torch.bfloat16)
        if found != expected or not (narrow or constant.dtype == described.dtype):
            yield f"the constant is {constant.dtype}{list(found)}, the graph says {described.dtype}{list(expected)}"


def _linear_problems(node: Node) -> Iterator[str]:
    x, weight, bias = (*node.args, None)[:3]
    shapes = [argument.meta["val"].shape if isinstance(argument, Node) else None for argument in (x, weight, bias)]
    if shapes[0] is None or shapes[1] is None or "val" not in node.meta:
        yield "input, weight and result need their shapes in meta"
        return
    n, k = shapes[1]
    if shapes[0][-1] != k:
        yield f"input ends in {shapes[0][-1]}, the weight is [{n}, {k}]"
    if node.meta["val"].shape[-1] != n:
        yield f"result ends in {node.meta['val'].shape[-1]}, the weight is [{n}, {k}]"
    if shapes[2] is not None and math.prod(shapes[2]) != n:
        yield f"bias is {list(shapes[2])}, the weight is [{n}, {k}]"


def _experts_problems(node: Node) -> Iterator[str]:
    x, expert, weight, bias = ([a.meta["val"].shape if isinstance(a, Node) else None for a in node.args] + [None])[:4]
    if weight is None or len(weight) != 3:
        yield f"the weight is {None if weight is None else list(weight)}, expected [experts, n, k]"
        return
    experts, n, k = weight
    if x is None or len(x) != 2 or x[1] != k:
        yield f"input is {None if x is None else list(x)}, the weight is [{experts}, {n}, {k}]"
    elif expert is None or len(expert) != 1:
        yield f"the experts' indices are {None if expert is None else list(expert)}, expected one for each of [{x[0]}] rows"
    if bias is not None and list(bias) != [experts, n]:
        yield f"bias is {list(bias)}, the weight is [{experts}, {n}, {k}]"


def _site_problems(graph: Graph) -> Iterator[tuple[Site, str]]:
    alive = set(graph.module.graph.nodes)
    names: set[str] = set()
    inputs: dict[int, Site] = {}
    storages: dict[int, tuple] = {}
    for site in graph.sites:
        if site.name in names:
            yield site, "two sites have this name"
        names.add(site.name)
        if site.node not in alive:
            yield site, "its node is not in the graph"
            continue
        if getattr(site.node.target, "namespace", "") == _OUR_NAMESPACE:
            continue
        if not has_attribute(graph.module, site.weight):
            yield site, f"there is no weight {site.weight}"
            continue
        position = {"embedding": 0, "linear": 1, "experts": 2}[site.kind]
        reader = site.node.args[position]
        if not isinstance(reader, Node) or reader.op != "get_attr" or reader.target != site.weight:
            yield site, f"the node reads {reader}, not the weight {site.weight}"
        weight = attribute(graph.module, site.weight)
        if tuple(weight.shape) != site.weight_shape:
            yield site, f"the weight is {list(weight.shape)}, the site says {list(site.weight_shape)}"
        if site.tie_group is not None:
            key = storage_key(weight)
            if storages.setdefault(site.tie_group, key) != key:
                yield site, f"tie group {site.tie_group} does not share one storage"
        if site.input_group >= 0:
            first = inputs.setdefault(site.input_group, site)
            if first.shape[1] != site.shape[1] and first.kind == site.kind == "linear":
                yield site, f"input group {site.input_group} has inputs of {first.shape[1]} and {site.shape[1]}"
