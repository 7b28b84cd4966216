"""Export, lower and write a model for its target."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.artifact.writer import ArtifactWriter
    from qcompiler.capture.prepared import Prepared
    from qcompiler.quantizer import Quantizer
    from qcompiler.report.progress import Reporter

MODEL_FILE, DATA_FILE, TORCH_FILE = "model.onnx", "model.onnx.data", "model.pt2"


def emit(
    writer: ArtifactWriter, prepared: Prepared, quantizer: Quantizer, target: str, reporter: Reporter
) -> dict[str, Any]:
    """Run the passes inside the exporter, lower for `target`, write the model's files.

    Returns:
        `layers`: the content of layers.json; `manifest`: what the manifest says of the model's files, inputs and cache.
    """
    return (_torch if target == "torch" else _onnx)(writer, prepared, quantizer, target, reporter)


def _onnx(
    writer: ArtifactWriter, prepared: Prepared, quantizer: Quantizer, target: str, reporter: Reporter
) -> dict[str, Any]:
    from qcompiler.capture.dimensions import ports
    from qcompiler.lower.external import check_saved, external_bytes, save
    from qcompiler.lower.onnx import finish, lower, op_counts
    from qcompiler.lower.quick_match import quick_match
    from qcompiler.pipeline.accounting import inline_bytes, layers_file, packed_totals

    with quick_match():
        program = prepared.export_onnx(quantizer)
        reporter.stage("lower")
        lowered = lower(program, decoder=prepared.kind in ("decoder", "encoder-decoder"))
    if target == "onnx-stock":
        packed, inline = _to_stock(lowered.model, quantizer), 0
        lowered.op_counts = op_counts(lowered.model)
    else:
        packed, inline = packed_totals(lowered.model), inline_bytes(lowered.model)
        finish(lowered, quantizer.recipe.own_attention)
    inputs, outputs = ports(lowered.model)
    reporter.stage("write")
    writer.reserve(external_bytes(lowered.model))
    with writer.open(DATA_FILE) as data:
        saved = save(lowered.model, writer.path(MODEL_FILE), data, DATA_FILE)
    check_saved(writer.path(MODEL_FILE), saved)
    writer.write_json(
        "trace/lowering.json",
        {"schema": 1, "ops": lowered.op_counts, "notes": lowered.notes, "cache": lowered.cache.reason},
    )
    return {
        "layers": layers_file(quantizer, saved, packed, inline),
        "manifest": {
            "entry": MODEL_FILE,
            "inputs": [_port(p) for p in inputs],
            "outputs": [_port(p) for p in outputs],
            "cache": _with_step(_cache(lowered, inputs, outputs), prepared),
            "unfused": lowered.unfused,
            **_limits(prepared),
        },
    }


def _limits(prepared: Prepared) -> dict[str, Any]:
    """What the manifest says of texts that the graph is not right for, a missing cache and what was left out."""
    extra: dict[str, Any] = {} if prepared.longest is None else {"longest": prepared.longest}
    if prepared.shortest > 1:
        extra["shortest"] = prepared.shortest
    if prepared.fixed is not None:
        extra["fixed_length"] = asdict(prepared.fixed)
    if prepared.whole is not None:
        extra["whole_text"] = {"reason": prepared.whole, "causal": prepared.causal}
    if prepared.left_out:
        extra["left_out"] = prepared.left_out
    return {"extra": extra} if extra else {}


def _with_step(cache: dict[str, Any] | None, prepared: Prepared) -> dict[str, Any] | None:
    return None if cache is None else cache | {"step": prepared.step}


def _to_stock(model: Any, quantizer: Quantizer) -> dict[str, int]:
    """Lower to stock ops; the layers' records then tell what their tensors take there. Totals by kind."""
    from qcompiler.lower.stock import to_stock
    from qcompiler.pipeline.accounting import KINDS, layer_records
    from qcompiler.pipeline.instruments import peak_rss_bytes

    start = time.perf_counter()
    weights = to_stock(model)
    layers = {}
    for record in layer_records(quantizer):
        if record["format"] != "float32":
            size = sum(weights[f"{record['packed_as']}.codes"].values())
            count = record["experts"] * math.prod(record["shape"])
            layers[record["name"]] = {"bytes": size, "bits_per_weight": round(8 * size / count, 4)}
    timing = {"milliseconds": 1000 * (time.perf_counter() - start), "peak_rss_bytes": peak_rss_bytes()}
    quantizer.trace.add_numbers("to_stock", "lower", layers, {}, timing)
    return {key: sum(sizes.get(key, 0) for sizes in weights.values()) for key in KINDS}


def _port(port: Any) -> dict[str, Any]:
    result = {"name": port.name, "dtype": port.dtype, "shape": list(port.shape), "role": port.role}
    return result if port.layer is None else result | {"layer": port.layer}


def _cache(lowered: Any, inputs: list[Any], outputs: list[Any]) -> dict[str, Any] | None:
    from qcompiler.lower.share_cache import cache_layers, cache_states

    layers, states = cache_layers(lowered.model), cache_states(lowered.model)
    if not layers and not states:
        return None
    by_name = {p.name: p for p in inputs}
    records = []
    for layer in layers:
        shape = by_name[layer.past_key].shape
        names = {key: getattr(layer, key) for key in ("past_key", "past_value", "present_key", "present_value")}
        records.append({**names, "heads": shape[1], "head_dim": shape[-1], "dtype": by_name[layer.past_key].dtype})
    return {
        "kind": lowered.cache.kind,
        "past_length": lowered.cache.past_length,
        "reason": lowered.cache.reason,
        "layers": records,
        "states": [{"past": state.past, "present": state.present, "layer": state.layer} for state in states],
    }


def _torch(
    writer: ArtifactWriter, prepared: Prepared, quantizer: Quantizer, target: str, reporter: Reporter
) -> dict[str, Any]:
    from qcompiler.capture.dimensions import program_ports
    from qcompiler.lower import torch as lower
    from qcompiler.lower.external import Placed, Saved
    from qcompiler.pipeline.accounting import layers_file, planned_totals

    program = prepared.export_torch(quantizer)
    inputs, outputs = program_ports(program, prepared)
    inputs = [replace(p, name=p.path) for p in inputs]  # the flat program's inputs go by position
    reporter.stage("lower")
    flat, notes = lower.flatten(program, prepared, quantizer.recipe.own_attention)
    reporter.stage("write")
    writer.write_json("trace/lowering.json", {"schema": 1, "notes": notes})
    path = writer.path(TORCH_FILE)
    weights = lower.save(flat, path)
    # the container's own bytes stand under `graph`
    saved = Saved((Placed(TORCH_FILE, 0, weights),), path.stat().st_size - weights, weights)
    return {
        "layers": layers_file(quantizer, saved, planned_totals(quantizer)),
        "manifest": {
            "entry": TORCH_FILE,
            "inputs": [_port(p) for p in inputs],
            "outputs": [_port(p) | {"name": _output_name(p)} for p in outputs],
            "cache": _with_step(_torch_cache(inputs), prepared),
            "unfused": [],
            **_limits(prepared),
        },
    }


def _output_name(port: Any) -> str:
    """A cache's tensor goes out under another name than it came in."""
    return f"output.{port.name}" if port.role.startswith("present") else port.name


def _torch_cache(inputs: list[Any]) -> dict[str, Any] | None:
    keys = [p for p in inputs if p.role == "past_key"]
    values = [p for p in inputs if p.role == "past_value"]
    layers = [
        {"past_key": k.name, "past_value": v.name, "present_key": f"output.{k.name}", "present_value": f"output.{v.name}",
         "heads": k.shape[1], "head_dim": k.shape[-1], "dtype": k.dtype}
        for k, v in zip(keys, values, strict=True)
    ]  # fmt: skip
    states = [
        {"past": p.name, "present": f"output.{p.name}", "layer": p.layer} for p in inputs if p.role == "past_state"
    ]
    if not layers and not states:
        return None
    kind, reason = ("growing", "torch concatenates") if layers else ("state", "no layer has keys and values")
    return {"kind": kind, "past_length": None, "reason": reason, "layers": layers, "states": states}
