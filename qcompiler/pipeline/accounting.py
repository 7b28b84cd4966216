"""What every layer became and what every byte of the files is for (layers.json)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qcompiler.lower.edit import stored
from qcompiler.lower.external import INLINE_BYTES
from qcompiler.ops import SPECS
from qcompiler.ops.activation_range import INPUTS
from qcompiler.ops.formats import Activation, VqFormat, parse_weight_format
from qcompiler.ops.linear_mixed import outlier_bytes
from qcompiler.ops.packing import format_of, packed_bytes_of
from qcompiler.ops.spec import DOMAIN
from qcompiler.passes.rewrite.site_product import WEIGHT
from qcompiler.pipeline.trace import plain
from qcompiler.recipe.schema import AnyScheme, VqScheme

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.lower.external import Saved
    from qcompiler.quantizer import Quantizer

SCHEMA = 1
# What the bytes of a packed weight, and of what a site has beside it, are: float columns (with their indices), and scale,
# zero point and offset of static activations.
KINDS = ("codes", "scales", "zeros", "codebooks", "padding", "outliers", "activations")


def layer_records(quantizer: Quantizer) -> list[dict[str, Any]]:
    """One record a site, in graph order."""
    graph, context = quantizer.graph, quantizer.context
    assert graph is not None and context is not None, "call quantize first"
    state = quantizer.trace.layers()
    records = []
    for site in graph.sites:
        n, k = site.shape
        record: dict[str, Any] = {
            "name": site.name,
            "kind": site.kind,
            "role": site.role,
            "shape": [n, k],
            "experts": site.experts,
            "input_group": site.input_group,
            "tie_group": site.tie_group,
            "float_bytes": 4 * site.size,
            "reason": None,
        }
        scheme = context.schemes.get(site.name)
        if scheme is None:
            record |= {
                "format": "float32",
                "bytes": 4 * site.size,
                "bits_per_weight": 32.0,
                "reason": context.left_in_float.get(site.name),
            }
        else:
            record |= _described(scheme) | {"activation": scheme.activations, "packed_rows": [0, n], "edges": []}
            record |= state.get(site.name, {})
            if site.kind == "embedding":
                record["activation"] = None  # a lookup has none
        records.append(plain(record))
    return records


def _described(scheme: AnyScheme) -> dict[str, Any]:
    if isinstance(scheme, VqScheme):
        format = scheme.weight_format
        table = None if scheme.fixed is None else scheme.fixed if isinstance(scheme.fixed, str) else list(scheme.fixed)
        return {"dim": format.dim, "centroids": format.centroids, "group": format.group, "table": table}
    return {"bits": scheme.bits, "group": scheme.weight_format.group, "symmetric": scheme.symmetric}


def layers_file(quantizer: Quantizer, saved: Saved | None, packed: dict[str, int], inline: int = 0) -> dict[str, Any]:
    """The content of layers.json.

    Args:
        quantizer: after `quantize`.
        saved: the files as written; None when nothing was (a dry run).
        packed: bytes of the weights' tensors by `codes`, `scales`, `zeros`, `padding` (see `packed_totals`).
        inline: of these, bytes that lie in the graph (see `inline_bytes`).
    """
    coverage, left = quantizer.coverage()
    records = layer_records(quantizer)
    weights = sum(r["experts"] * r["shape"][0] * r["shape"][1] for r in _once(records) if r["format"] != "float32")
    sizes = dict(packed)
    if saved is not None:
        sizes["float"] = sum(t.bytes for t in saved.tensors) - sum(packed.values()) + inline
        sizes["alignment"] = saved.alignment_bytes
        sizes["graph"] = saved.graph_bytes - inline
        sizes["total"] = sum(sizes.values())
    totals = {
        "layers": len(records),
        "bytes": sizes,
        "bits_per_weight": round(8 * sum(packed.values()) / weights, 4) if weights else None,
        "weights": weights,
        "coverage": round(coverage, 6),
    }
    left_in_float = [{"name": name, "bytes": size, "reason": reason} for name, (size, reason) in left.items()]
    return {"schema": SCHEMA, "layers": records, "left_in_float": left_in_float, "totals": totals}


def _once(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without the second of a tied pair."""
    seen: set[int] = set()
    kept = []
    for record in records:
        tie = record["tie_group"]
        if tie is None or tie not in seen:
            kept.append(record)
        if tie is not None:
            seen.add(tie)
    return kept


def planned_totals(
    quantizer: Quantizer, bytes_of: Callable[..., dict[str, int]] = packed_bytes_of
) -> dict[str, int]:
    """Bytes that the packed weights take, from their shapes and formats alone; `bytes_of` knows the layout."""
    totals = dict.fromkeys(KINDS, 0)
    records = layer_records(quantizer)
    for record in _once(records):
        if record["format"] != "float32":
            format = parse_weight_format(record["format"])
            for key, value in bytes_of(*record["shape"], format).items():
                if not (key == "codebooks" and _follows(record) and isinstance(format, VqFormat) and not format.block_rows):
                    totals[key] += record["experts"] * value
    for record in records:  # a site's own, also where it shares its weight
        beside = record.get("beside")
        if beside is None and record.get("activation") == Activation.INT8_STATIC.label:
            beside = {"activations": 5 + 4 * record["shape"][0]}  # before calibration: as if there were a zero point
        for key, value in (beside or {}).items():
            # scale and zero point are those of the first part; the offset is the layer's own
            totals[key] += value // 4 * 4 - 4 if key == "activations" and _follows(record) else value
    return totals


def _follows(record: dict[str, Any]) -> bool:
    """Whether the layer is part of a fused op and not its first: what all rows share is stored once."""
    return record["packed_rows"][0] > 0


def packed_totals(model: ir.Model) -> dict[str, int]:
    """Bytes of the packed weights that the nodes of our domain read, by kind, each tensor once."""
    by_name = {spec.onnx_name: spec for spec in SPECS.values()}
    totals = dict.fromkeys(KINDS, 0)
    seen: set[int] = set()
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        names = [i.name for i in by_name[node.op_type].inputs]
        for key, value in _beside(dict(zip(names, node.inputs, strict=False)), node.attributes.get_int("n", 0), seen).items():
            totals[key] += value
        codes = node.inputs[names.index("codes")]
        if id(codes) in seen:
            continue
        seen.add(id(codes))
        present = [name for name, value in zip(names, node.inputs, strict=False) if value is not None]
        attributes = by_name[node.op_type].read(node.attributes)
        experts = attributes.get("experts", 1)
        for key, value in packed_bytes_of(attributes["n"], attributes["k"], format_of(attributes, present)).items():
            totals[key] += experts * value
    return totals


def inline_bytes(model: ir.Model) -> int:
    """Bytes of the packed weights' tensors that are small enough to lie in the graph, each once."""
    names = {spec.onnx_name: [i.name for i in spec.inputs] for spec in SPECS.values()}
    values = {
        id(value): value
        for node in model.graph.all_nodes()
        if node.domain == DOMAIN
        for name, value in zip(names[node.op_type], node.inputs, strict=False)
        if value is not None and name in WEIGHT
    }
    return sum(size for value in values.values() if (size := stored(value).nbytes) <= INLINE_BYTES)


def _beside(inputs: dict[str, ir.Value | None], n: int, seen: set[int]) -> dict[str, int]:
    """Bytes of what a node of n outputs reads beside its packed weight, by kind; tensors in `seen` do not count again."""
    names = ("columns", "outliers", *INPUTS)
    own = {name: v for name in names if (v := inputs.get(name)) is not None and id(v) not in seen}
    seen.update(map(id, own.values()))
    # what is small lies in the graph, and counts there
    large = {name: size for name, v in own.items() if (size := stored(v).nbytes) > INLINE_BYTES}
    sizes = {"activations": sum(large.get(name, 0) for name in INPUTS), "outliers": large.get("columns", 0)}
    if "outliers" in large:
        floats = outlier_bytes(n, stored(own["outliers"]).shape.numpy()[1], indices=False)
        sizes |= {"outliers": sizes["outliers"] + floats["outliers"], "padding": floats["padding"]}
    return sizes
