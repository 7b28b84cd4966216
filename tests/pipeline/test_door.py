"""The unmodified exporters of transformers, with our quantizer in their configuration."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

import qcompiler
from qcompiler.capture.prepare import prepare
from qcompiler.errors import InputError
from qcompiler.ops.onnx_ops import attach_bodies
from qcompiler.ops.spec import DOMAIN
from qcompiler.pipeline.trace import Trace
from tests.models import tiny

RECIPE, TOLERANCE = "int4-weights", 1e-4  # float activations; relative to the largest output


@pytest.fixture(scope="module")
def decode() -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """The decode step of a tiny llama as transformers takes it apart, and which axes vary."""
    model = tiny("llama")
    ids = torch.arange(5)[None]
    request = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    part, inputs = decompose_for_generation(model, request, multi_token_decode=True)["decode"]
    return part, inputs, prepare(model).dynamic_shapes


@pytest.fixture(scope="module")
def decoder(decode: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, qcompiler.Quantizer, Path]:
    part, inputs, shapes = decode
    quantizer = qcompiler.Quantizer(RECIPE)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, quantizer=quantizer)
    exported = OnnxExporter().export(part, copy.deepcopy(inputs), config)
    folder = tmp_path_factory.mktemp("door")
    exported.save_pretrained(folder)
    return exported, quantizer, folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, qcompiler.Quantizer, Path]:
    quantizer = qcompiler.Quantizer(RECIPE)
    exported = OnnxExporter().export(tiny("bert"), tokens(), OnnxConfig(quantizer=quantizer))
    folder = tmp_path_factory.mktemp("door-encoder")
    exported.save_pretrained(folder)
    return exported, quantizer, folder


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 25).reshape(2, 11)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_torch(quantizer: qcompiler.Quantizer, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the rewritten graph computes."""
    assert quantizer.graph is not None
    with torch.no_grad():
        outputs = quantizer.graph.module(**copy.deepcopy({name: inputs[name] for name in quantizer.graph.example}))
    return {name: tensor.numpy() for name, tensor in get_leaf_tensors(outputs).items()}


def by_runtime(source: Any, options: onnxruntime.SessionOptions, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in get_leaf_tensors(inputs).items()}
    # A tensor that comes back changed has its side in its name.
    given = {port.name: feeds[port.name.removeprefix("input.")] for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    return {name.removeprefix("output."): value for name, value in zip(names, session.run(names, given), strict=True)}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        assert np.abs(found[name] - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name


def assert_every_site_is_a_node(model: ir.Model, quantizer: qcompiler.Quantizer) -> None:
    assert quantizer.graph is not None and quantizer.context is not None
    sites = quantizer.graph.sites
    assert sites and all(site.name in quantizer.context.schemes for site in sites)
    ours = [node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for kind, op in (("linear", "LinearNBit"), ("embedding", "EmbeddingNBit")):
        assert ours.count(op) == len({site.node for site in sites if site.kind == kind})  # fused ones have one node


def plain_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def test_a_decoder(decode: Any, decoder: Any) -> None:
    _, inputs, _ = decode
    exported, quantizer, folder = decoder
    assert_every_site_is_a_node(exported.program, quantizer)
    assert_every_site_is_a_node(ir.load(folder / "model.onnx"), quantizer)
    expected = by_torch(quantizer, inputs)
    assert_close(by_runtime(str(folder / "model.onnx"), qcompiler.session_options(1), inputs), expected)


def test_another_number_of_tokens(decode: Any, decoder: Any) -> None:
    """What was exported as dynamic is dynamic: three new tokens on the same past."""
    _, inputs, _ = decode
    _, quantizer, folder = decoder
    more = inputs | {"input_ids": torch.tensor([[7, 8, 9]]), "position_ids": torch.tensor([[5, 6, 7]])}
    found = by_runtime(str(folder / "model.onnx"), qcompiler.session_options(1), more)
    assert found["logits"].shape[1] == 3
    assert_close(found, by_torch(quantizer, more))


def test_an_encoder(encoder: Any) -> None:
    exported, quantizer, folder = encoder
    assert_every_site_is_a_node(exported.program, quantizer)
    expected = by_torch(quantizer, tokens())
    assert_close(by_runtime(str(folder / "model.onnx"), qcompiler.session_options(1), tokens()), expected)


def test_a_saved_export_runs_through_transformers(encoder: Any) -> None:
    _, quantizer, folder = encoder
    loaded = ExportedModel.from_pretrained(folder, session_options=qcompiler.session_options(1))
    outputs = {name: tensor.numpy() for name, tensor in get_leaf_tensors(dict(loaded(**tokens()))).items()}
    assert_close(outputs, by_torch(quantizer, tokens()))


def test_function_bodies_make_it_run_anywhere(decode: Any, decoder: Any, tmp_path: Path) -> None:
    _, inputs, _ = decode
    _, quantizer, folder = decoder
    program = ir.load(folder / "model.onnx")
    counts = attach_bodies(program)
    assert sum(counts.values()) == len({site.node for site in quantizer.graph.sites})
    assert attach_bodies(program) == counts, "a second time changes nothing"
    ir.save(program, tmp_path / "portable.onnx", external_data="portable.onnx.data")
    assert_close(by_runtime(str(tmp_path / "portable.onnx"), plain_options(), inputs), by_torch(quantizer, inputs))


def test_without_bodies_and_without_the_library_it_is_refused(encoder: Any) -> None:
    _, _, folder = encoder
    with pytest.raises(Exception, match=DOMAIN.replace(".", r"\.")):
        onnxruntime.InferenceSession(str(folder / "model.onnx"), plain_options())


def test_configurations_are_written_without_the_quantizer(decoder: Any) -> None:
    exported, quantizer, folder = decoder
    config = OnnxConfig(dynamic=True, quantizer=quantizer)
    written = json.loads(config.to_json_string())
    assert written["dynamic"] is True and "quantizer" not in written
    assert OnnxConfig.from_dict(dict(config)).quantizer is quantizer
    record = json.loads((folder / "export.json").read_text())
    assert record["export_format"] == "onnx" and exported.program is not None
    assert (folder / "config.json").is_file()


def test_torch_export(decode: Any, decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch warns with a format string that lacks an argument, which pytest's log capture takes for a failure.
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    part, inputs, shapes = decode
    quantizer = qcompiler.Quantizer(RECIPE)
    config = DynamoConfig(dynamic=True, dynamic_shapes=shapes, quantizer=quantizer)
    exported = DynamoExporter().export(part, copy.deepcopy(inputs), config)
    exported.save_pretrained(tmp_path)
    program = torch.export.load(tmp_path / "model.pt2")
    targets = [node.target for node in program.graph.nodes]
    products = {site.node for site in quantizer.graph.sites if site.kind == "linear"}
    assert targets.count(torch.ops.qcompiler.linear_nbit.default) == len(products)
    with torch.no_grad():
        outputs = program.module()(**copy.deepcopy({name: inputs[name] for name in shapes}))
    found = {name: tensor.numpy() for name, tensor in get_leaf_tensors(outputs).items()}
    assert_close(found, by_torch(decoder[1], inputs))


class Product(torch.nn.Module):
    """Two inputs, so that their order matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + y


def output_sqnr(quantizer: qcompiler.Quantizer) -> float:
    return quantizer.trace.layers()["linear"]["output_sqnr_db"]


def quantized(quantizer: qcompiler.Quantizer) -> qcompiler.Quantizer:
    inputs = {"x": torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), "y": torch.zeros(2, 32)}
    program = torch.export.export(Product(), args=(), kwargs=inputs)
    quantizer.validate_environment(DynamoConfig().export_format)
    quantizer.quantize(program.module(), inputs, DynamoConfig().export_format)
    return quantizer


def test_calibration() -> None:
    """Samples in any order, with keys that the graph does not take, readable once; the original is left alone."""
    torch.manual_seed(0)
    module_seed = torch.random.get_rng_state()

    def run(quantizer: qcompiler.Quantizer) -> qcompiler.Quantizer:
        torch.random.set_rng_state(module_seed)
        return quantized(quantizer)

    original = qcompiler.Quantizer("int4")
    samples = [{"y": torch.zeros(3, 32), "labels": torch.zeros(3), "x": torch.randn(3, 64)} for _ in range(2)]
    calibrated = run(original.with_calibration(samples))
    assert calibrated is not original and original.calibration_dataset is None and original.graph is None
    assert original.trace == Trace()
    once = run(original.with_calibration(iter(samples)))
    assert output_sqnr(once) == output_sqnr(calibrated) != output_sqnr(run(qcompiler.Quantizer("int4")))


def test_a_quantizer_serves_again() -> None:
    quantizer = quantized(qcompiler.Quantizer("int4"))
    names = [entry.record["name"] for entry in quantizer.trace.entries]
    assert [entry.record["name"] for entry in quantized(quantizer).trace.entries] == names


def test_a_sample_that_lacks_an_input_is_named() -> None:
    with pytest.raises(InputError, match=r"calibration sample 0: .*lacks the traced inputs \['x'\]"):
        quantized(qcompiler.Quantizer("int4", calibration_dataset=[{"y": torch.zeros(2, 32)}]))
