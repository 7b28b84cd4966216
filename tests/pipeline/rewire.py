"""Make a compiled model read its weights with float activations: the op's attribute says which kernel runs."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import onnx_ir as ir
import torch

from qcompiler.artifact.manifest import seal
from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_nbit import LINEAR_NBIT
from qcompiler.ops.torch_ops import overload


def float_artifact(artifact: Path, target: Path) -> Path:
    """A copy of an artifact whose products take float activations; the manifest is sealed anew."""
    from qcompiler.ops.onnx_ops import attach_bodies

    shutil.copytree(artifact, target)
    model = ir.load(target / "model.onnx")
    for key in [key for key in model.functions if key[1] != "GroupQueryAttention"]:
        del model.functions[key]
    for node in model.graph.all_nodes():
        if node.domain == "ai.qcompiler" and node.op_type != "GroupQueryAttention":
            for name in [name for name in node.attributes if name.startswith("variant_")]:
                del node.attributes[name]
            if "activation" in node.attributes:
                node.attributes["activation"] = ir.AttrInt64("activation", int(Activation.FLOAT))
    attach_bodies(model)
    ir.save(model, target / "model.onnx")
    content = (target / "model.onnx").read_bytes()
    manifest = json.loads((target / "manifest.json").read_bytes())
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "manifest.json").write_bytes(seal(manifest))
    return target


def float_module(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a rewritten graph whose products take float activations."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.target is overload("linear_nbit"):
            arguments = list(node.args)
            at = len(LINEAR_NBIT.inputs) + LINEAR_NBIT.attributes.index("activation")
            arguments[at] = int(Activation.FLOAT)
            node.args = tuple(arguments)
    module.recompile()
    return module
