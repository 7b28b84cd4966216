"""Small artifacts with records and no model, written by the documented format (docs/artifact.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompiler.artifact import ArtifactWriter, build_manifest

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"

CAPTURED = """\
x: float32[1, s] = placeholder
w_q: float32[256, 256] = parameter
q: float32[1, s, 256] = aten.linear(x, w_q)
relu: float32[1, s, 256] = aten.relu(q)
output = relu
"""
SOLVED = """\
x: float32[1, s] = placeholder
w_q_codes: uint8[16, 32, 64] = buffer
q: float32[1, s, 256] = qcompiler.linear_nbit(x, w_q_codes)
relu: float32[1, s, 256] = aten.relu(q)
output = relu
"""


def manifest(**changes: Any) -> dict[str, Any]:
    """A manifest as `compile` builds it."""
    values: dict[str, Any] = {
        "target": "onnx",
        "kind": "decoder",
        "source": "tiny",
        "model_type": "llama",
        "parameters": 131072,
        "recipe": "int4",
        "entry": "model.onnx",
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, "length"]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, "length", 64]}],
        "context": 1024,
    }
    return build_manifest(**(values | changes))


def layer(name: str, **changes: Any) -> dict[str, Any]:
    """A record of layers.json."""
    return {
        "name": name,
        "kind": "linear",
        "role": "attn.q",
        "shape": [256, 256],
        "format": "int4-g32-sym",
        "bits": 4,
        "group": 32,
        "symmetric": True,
        "activation": "int8-block128",
        "method": "rtn",
        "clipping": "mse",
        "bits_per_weight": 4.5,
        "bytes": 36864,
        "float_bytes": 262144,
        "weight_sqnr_db": 21.4,
        "output_sqnr_db": 22.0,
        "input_group": 0,
        "tie_group": None,
        "reason": None,
    } | changes


def records(**changes: Any) -> dict[str, Any]:
    """Everything that a fake holds, by file name; `changes` replace or add files."""
    pass_record = {"schema": 1, "config": {}, "required": False, "notes": {}, "nodes_before": 5, "nodes_after": 5}
    files: dict[str, Any] = {
        "model.onnx": b"not really a graph",
        "model.onnx.data": bytes(range(256)) * 16,
        "recipe.yaml": b"name: int4\nlinear:\n  bits: 4\n  group: 32\n",
        "layers.json": {
            "schema": 1,
            "layers": [layer(Q), layer(K, role="attn.k", format="float32", method=None, bits_per_weight=32.0,
                             bytes=262144, weight_sqnr_db="inf", output_sqnr_db=None, reason="left out by the recipe")],
            "left_in_float": [{"name": "rope.table", "bytes": 4096, "reason": "not a product"}],
            "totals": {"layers": 2, "bytes": {"codes": 32768, "scales": 4096, "float": 266240, "total": 303104},
                       "bits_per_weight": 18.25, "coverage": 0.5},
        },
        "trace/passes.jsonl": [
            pass_record | {"index": 0, "name": "capture", "stage": "capture", "matched": 0, "changed": 0, "skipped": [],
                           "fallbacks": [], "graph": "trace/graphs/000-capture.txt", "layers": {}},
            pass_record | {"index": 1, "name": "find_sites", "stage": "analyse", "matched": 2, "changed": 2,
                           "skipped": [{"node": "mm_1", "reason": "the weight is no constant"},
                                       {"node": "mm_2", "reason": "the weight is no constant"}],
                           "fallbacks": [], "graph": "trace/graphs/001-find_sites.txt",
                           "layers": {Q: {"format": "float32", "bytes": 262144}, K: {"format": "float32"}}},
            pass_record | {"index": 2, "name": "round_to_nearest", "stage": "solve", "matched": 1, "changed": 1,
                           "skipped": [], "fallbacks": [], "graph": "trace/graphs/002-round_to_nearest.txt",
                           "layers": {Q: {"format": "int4-g32-sym", "bytes": 36864, "weight_sqnr_db": 21.4}}},
        ],
        "trace/timings.jsonl": [
            {"index": 0, "name": "capture", "milliseconds": 100.0, "peak_rss_bytes": 2**28},
            {"index": 1, "name": "find_sites", "milliseconds": 1.25, "peak_rss_bytes": 2**28},
            {"index": 2, "name": "round_to_nearest", "milliseconds": 12.5, "peak_rss_bytes": 2**29},
        ],
        "trace/graphs/000-capture.txt": CAPTURED.encode(),
        "trace/graphs/001-find_sites.txt": CAPTURED.encode(),
        "trace/graphs/002-round_to_nearest.txt": SOLVED.encode(),
    }  # fmt: skip
    return files | changes


def write(target: Path, files: dict[str, Any] | None = None, overwrite: bool = False, **changes: Any) -> Path:
    """Write a fake artifact; `changes` go to the manifest."""
    with ArtifactWriter(target, overwrite=overwrite) as writer:
        for name, content in (records() if files is None else files).items():
            if isinstance(content, bytes):
                writer.path(name).write_bytes(content)
            elif isinstance(content, list):
                writer.write_lines(name, content)
            else:
                writer.write_json(name, content)
        writer.set_manifest(manifest(**changes))
    return target


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything under a directory: name -> content (None for a directory)."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }
