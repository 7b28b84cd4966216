"""One recipe, two targets: the packed bytes of every layer are the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from torch import nn

import qcompiler
from qcompiler.ops.spec import DOMAIN, SPECS
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.probe import output_sqnr
from qcompiler.runtime.artifact import open_artifact
from tests.sweep.other_device import NAME, OtherDevice

WIDTH = 256
FLOAT = {"activations": "float"}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group": 128} | FLOAT,
    "rows": {"bits": 8, "group": 0, "activations": "int8-token"},
    "mixed": {"bits": 8, "activations": "int8-token"},
    "vq2": {"vq": "vq2"} | FLOAT,
    "nf4": {"vq": "nf4"} | FLOAT,
    "int3": {"bits": 3, "group": 64, "symmetric": False} | FLOAT,
}
RECIPE: dict[str, Any] = {
    "name": "every format",
    "linear": {"bits": 4, "group": 32},
    "overrides": [{"select": {"name": name}, "scheme": scheme} for name, scheme in SCHEMES.items()],
    "passes": [
        {"llm_int8": {"threshold": 20.0, "max_share": 0.1, "select": {"name": "mixed"}}},
        {"round_to_nearest": {"iterations": 2}},
    ],
    "allow": {"min_coverage": 0},
}


class Layers(nn.Module):
    """A layer of each format, one after another, with something between them; two columns of x are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        for name in (*SCHEMES, "int4"):
            if name != "mixed":
                self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=name == "int8"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def of_torch(folder: Path) -> Counter[tuple[str, str]]:
    """(op, digest) of every tensor that an op of ours reads."""
    artifact = open_artifact(folder)
    module: Any = torch.export.load(artifact.file(artifact.entry)).module(check_guards=False)
    found: Counter[tuple[str, str]] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "qcompiler":
            name = node.target.overloadpacket.__name__.rpartition(".")[2]
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    owner, _, last = str(source.target).rpartition(".")
                    tensor = getattr(module.get_submodule(owner), last).detach().contiguous()
                    found[name, digest(tensor.flatten().view(torch.uint8).numpy().tobytes())] += 1
    return found


def of_onnx(folder: Path) -> Counter[tuple[str, str]]:
    artifact = open_artifact(folder)
    model = onnx.load(artifact.file(artifact.entry), load_external_data=False)
    load_external_data_for_model(model, str(folder))
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {spec.onnx_name: name for name, spec in SPECS.items()}
    found: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in names:
            for source in node.input:
                if source in held:
                    found[names[node.op_type], digest(onnx.numpy_helper.to_array(held[source]).tobytes())] += 1
    return found


def compiled(folder: Path, target: Any, recipe: dict[str, Any], **given: Any) -> Path:
    x = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1))
    x[:, [5, 77]] *= 50
    model = Layers().eval()
    return qcompiler.compile(model, output=folder, recipe=recipe, target=target, example=(x,), reproducible=True, **given).path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    return {target: compiled(folder / target, target, RECIPE) for target in ("torch", "onnx")}


def test_the_packed_bytes_are_the_same(artifacts: dict[str, Path]) -> None:
    torch_, onnx_ = of_torch(artifacts["torch"]), of_onnx(artifacts["onnx"])
    assert torch_ == onnx_
    assert {name for name, _ in torch_} == {"linear_nbit", "linear_vq", "linear_mixed"}
    # codes and scales of each; zeros; codebooks and their scales; columns, outliers; two biases
    assert sum(torch_.values()) == 2 * 7 + 1 + 2 * 2 + 2 + 2


def test_a_byte_that_differs_is_seen(artifacts: dict[str, Path]) -> None:
    found = of_torch(artifacts["torch"])
    other = Counter({(name, digest(key.encode())): count for (name, key), count in found.items()})
    assert other != found and of_onnx(artifacts["onnx"]) != other


def test_an_artifact_of_another_device_is_the_same(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass runs there, on the numbers of the CPU's kernels: every file is equal."""
    monkeypatch.setattr("qcompiler.runtime.device.find_device", lambda name: None)
    ops: Counter[str] = Counter()

    def there(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            with OtherDevice() as mode:
                result = function(*given)
            ops.update(mode.ops)
            return result

        return call

    monkeypatch.setattr(PassManager, "run", there(PassManager.run))
    monkeypatch.setattr("qcompiler.quantizer.output_sqnr", there(output_sqnr))
    made = compiled(tmp_path / "there", "torch", RECIPE, device=NAME)
    assert ops["qcompiler.linear_vq.default"] >= 2 and sum(ops.values()) > 1000
    assert of_torch(made) == of_torch(artifacts["torch"])
    assert (made / "layers.json").read_text() == (artifacts["torch"] / "layers.json").read_text()
