"""Lower an exported graph to ONNX for our op library: attention and norms fused, cache shared, function bodies attached."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from qcompiler.artifact.manifest import version
from qcompiler.capture.quiet import Quiet
from qcompiler.errors import UnsupportedError
from qcompiler.lower.angles import widen_angles
from qcompiler.lower.last_logits import keep_last_logits
from qcompiler.lower.one_token_query import one_token_queries
from qcompiler.lower.own_attention import use_own_attention
from qcompiler.lower.share_cache import CacheResult, cache_layers, cache_states, share_cache
from qcompiler.ops.onnx_ops import attach_bodies
from qcompiler.pipeline.trace import plain


@dataclass
class Lowered:
    """An ONNX model that is ready to be saved.

    Attributes:
        model: the model.
        cache: how its cache works.
        unfused: attention that no fused op expresses, each with its reason; empty when all are fused.
        op_counts: nodes by op type.
        notes: what each step did.
    """

    model: ir.Model
    cache: CacheResult
    unfused: list[dict[str, str]]
    op_counts: dict[str, int]
    notes: dict[str, Any] = field(default_factory=dict)


MODULE = "qcompiler.module"  # metadata of a node: path of the module that it comes from


def lower(model: ir.Model, *, decoder: bool) -> Lowered:
    """Fuse, share the cache, tidy, attach function bodies; `model` is changed in place.

    Raises:
        UnsupportedError: ONNX Runtime's fusions failed on the graph.
    """
    from qcompiler.lower import tidy

    notes: dict[str, Any] = {}
    with Quiet(), one_token_queries():
        try:
            fuse_for_onnxruntime(model, "cpu")
        except Exception as error:
            raise UnsupportedError(
                f"ONNX Runtime's fusions failed on the exported graph: {type(error).__name__}: {error}"
            ) from error
    cache = CacheResult("growing", reason="no cache")
    if decoder and cache_layers(model):
        cache = share_cache(model)
    elif decoder and cache_states(model):
        cache = CacheResult("state", reason="no layer has keys and values")
    notes["tidy"] = tidy.tidy(model)
    if decoder:
        notes["last_logits"] = plain(keep_last_logits(model))
    notes["function_bodies"] = attach_bodies(model)
    clean_metadata(model)
    return Lowered(model, cache, unfused_attention(model), op_counts(model), notes)


def finish(lowered: Lowered, own_attention: bool) -> None:
    """The last edits for our op library, where `own_attention` says so: angles that every runtime gives alike, and its attention
    in place of ONNX Runtime's where the node allows."""
    lowered.notes["angles"] = widen_angles(lowered.model) if own_attention else 0
    lowered.notes["own_attention"] = plain(use_own_attention(lowered.model, lowered.cache, own_attention))
    lowered.op_counts = op_counts(lowered.model)


def op_counts(model: ir.Model) -> dict[str, int]:
    """Nodes by op type, the domain before it where it is not ONNX's own."""
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes()
    )
    return dict(sorted(counts.items()))


def clean_metadata(model: ir.Model) -> None:
    """Keep of the exporter's metadata the module path of each node; stack traces name files of the compiling machine."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "qcompiler", version()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        for node in graph:
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            node.metadata_props.clear()
            path = ast.literal_eval(scopes)[:-1] if scopes else []
            if path and path[-1]:
                node.metadata_props[MODULE] = path[-1]
            for value in node.outputs:
                value.metadata_props.clear()


def unfused_attention(model: ir.Model) -> list[dict[str, str]]:
    """Softmax nodes between two products: attention that stayed in pieces."""
    found = []
    for node in model.graph.all_nodes():
        if node.op_type == "Softmax" and _reaches_matmul(node):
            found.append(
                {
                    "node": node.name or node.outputs[0].name or "",
                    "reason": "ONNX Runtime's fusions do not express this attention",
                }
            )
    return found


def _reaches_matmul(node: ir.Node, depth: int = 4) -> bool:
    """Whether the result of `node` is multiplied by a value that is not constant, a few elementwise ops away."""
    for user, _ in node.outputs[0].uses():
        if user.op_type == "MatMul" and all(v is not None and v.const_value is None for v in user.inputs):
            return True
        if (
            depth
            and user.op_type in ("Where", "Cast", "Mul", "IsNaN", "Reshape", "Add", "Dropout")
            and _reaches_matmul(user, depth - 1)
        ):
            return True
    return False
