"""Float artifacts made on the fly, for tests of what runs them: no op library needed (target `onnx-stock`)."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
from transformers.exporters.utils import decompose_for_generation

from qcompiler.artifact.manifest import seal
from qcompiler.lower.last_logits import keep_last_logits
from qcompiler.lower.share_cache import CacheResult, cache_layers, share_cache
from qcompiler.lower.tidy import tidy

REFERENCE = Path(__file__).parents[1] / "qcompiler" / "data" / "reference_lm"
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja")
_folders: list[tempfile.TemporaryDirectory] = []


def scratch() -> Path:
    """A directory that lives as long as this process."""
    _folders.append(tempfile.TemporaryDirectory(prefix="qcompiler-tests-"))
    return Path(_folders[-1].name)


@functools.cache
def reference_model() -> transformers.PreTrainedModel:
    """The bundled reference model in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    model.generation_config.do_sample = False
    return model


@functools.cache
def reference_export() -> Path:
    """The reference model as one fused decode graph with a growing cache: a `.onnx` file."""
    return export_decoder(reference_model(), scratch())


@functools.cache
def reference_artifact(kind: str = "shared") -> Path:
    """An artifact of the reference model, tokenizer included. `kind` of its cache: `shared` or `growing`."""
    model = ir.load(reference_export())
    result = share_cache(model) if kind == "shared" else CacheResult("growing")
    tidy(model)
    if kind == "shared":
        assert keep_last_logits(model).changed
    return write_decoder(scratch() / kind, model, result, reference_model().config, REFERENCE)


def export_decoder(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Export one graph for prefill and decode, batch 1, and fuse it as the compiler does."""
    ids = torch.arange(16)[None]
    request = dict(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=transformers.DynamicCache())
    part, inputs = decompose_for_generation(model, request, multi_token_decode=True)["decode"]
    shapes = _batch_of_one(get_auto_dynamic_shapes(inputs))
    program = OnnxExporter().export(part, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes)).program
    fuse_for_onnxruntime(program, "cpu")
    path = folder / "model.onnx"
    ir.save(program, path, external_data="model.onnx.data")
    return path


def _batch_of_one(shapes: Any) -> Any:
    """The exporter's dynamic axes without the batch."""
    if isinstance(shapes, dict):
        if shapes and all(isinstance(axis, int) for axis in shapes):
            return {axis: name for axis, name in shapes.items() if axis == (2 if len(shapes) == 4 else 1)}
        return {k: _batch_of_one(v) for k, v in shapes.items() if k not in ("use_cache", "return_dict")}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_batch_of_one(item) for item in shapes)
    return shapes


def write_decoder(
    folder: Path, model: ir.Model, cache: CacheResult, config: Any, checkpoint: Path | None = None, **changes: Any
) -> Path:
    """An artifact of a decoder graph; `changes` replace keys of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    for name in _COPIED if checkpoint is not None else ():
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / name)
    shapes = {value.name: value.shape for value in model.graph.inputs}
    layers = [
        {
            **{key: getattr(layer, key) for key in ("past_key", "past_value", "present_key", "present_value")},
            "heads": int(shapes[layer.past_key][1]), "head_dim": int(shapes[layer.past_key][3]), "dtype": "float32",
        }
        for layer in cache_layers(model)
    ]  # fmt: skip
    eos = config.eos_token_id
    manifest = {
        "kind": "decoder",
        "inputs": [_tensor(value) for value in model.graph.inputs],
        "outputs": [_tensor(value) for value in model.graph.outputs],
        "cache": {"kind": cache.kind, "past_length": cache.past_length, "layers": layers},
        "tokens": {"bos": config.bos_token_id, "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
                   "pad": config.pad_token_id},
        "context": getattr(config, "max_position_embeddings", None),
    }  # fmt: skip
    return write_manifest(folder, manifest | changes)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Complete `manifest` and write it with the size and hash of every file in `folder`."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        files[path.relative_to(folder).as_posix()] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    whole = {
        "format": "qcompiler-artifact", "schema": 1, "qcompiler": "0.1.0", "layout_version": 1, "target": "onnx-stock",
        "kind": "module", "entry": "model.onnx", "inputs": [], "outputs": [], "cache": None, "files": files,
        **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_bytes(seal(whole))
    return folder


def _tensor(value: ir.Value) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": str(np.dtype(value.dtype.numpy())), "shape": shape}
