"""Through the exporter and back: names, axes, silence, and the same numbers in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from transformers.exporters.configs import ExportFormat
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
from transformers.exporters.quantizers.base import ExportQuantizer

from qcompiler.capture.dimensions import ports, program_ports
from qcompiler.capture.ports import Port
from qcompiler.capture.prepare import prepare
from qcompiler.errors import GateError
from qcompiler.graph.graph import Graph
from tests.captures import ANALYSE, NORMALISE, analysed, run
from tests.models import ALWAYS, EXHAUSTIVE, VOCABULARY, is_decoder, tiny

onnxruntime = pytest.importorskip("onnxruntime")

# Fast ones always; the whole table when there is time.
CHOSEN = ["gpt2", "distilbert"]
EVERY = [
    *CHOSEN, *(pytest.param(name, marks=pytest.mark.slow) for name in [*ALWAYS, *EXHAUSTIVE] if name not in CHOSEN)
]  # fmt: skip
# How many of the two attentions ONNX Runtime's fusion takes whole; the others stay products and softmax.
UNFUSED = {
    "gemma2", "bloom", "falcon", "falcon_alibi", "gpt_oss", "codegen", "mpt", "gpt_neo", "xglm",
    "deepseek_v2", "deepseek_v3", "jetmoe",
}  # fmt: skip


class Passes(ExportQuantizer):
    """Our normalising and analysing passes where a recipe's would run."""

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.ONNX, ExportFormat.DYNAMO)

    def quantize(self, model, sample_inputs, export_format):
        print("progress of a pass")
        self.graph = Graph(model, "decoder", sample_inputs)
        run(self.graph, NORMALISE + ANALYSE)
        return model


@pytest.mark.parametrize("model_type", EVERY)
def test_onnx_runtime_gives_what_torch_gives(
    model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch_model = tiny(model_type)
    capfd.readouterr()
    passes = Passes()
    model = prepare(torch_model).export_onnx(passes)
    # Of everything on the way, only what our own passes say is heard.
    assert capfd.readouterr().out == "progress of a pass\n"
    assert len(passes.graph.sites) == len(analysed(model_type).graph.sites)
    inputs, outputs = ports(model)
    fuse_for_onnxruntime(model, "cpu")
    kinds = Counter(node.op_type for node in model.graph)
    if is_decoder(model_type):
        assert kinds["GroupQueryAttention"] == (0 if model_type in UNFUSED else 2)
    onnx_ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    check = check_decoder if is_decoder(model_type) else check_encoder
    check(session, inputs, outputs, torch_model)


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max().item()


def check_decoder(session, inputs: list[Port], outputs: list[Port], model: torch.nn.Module) -> None:
    assert {port.role for port in outputs} == {"logits", "present_key", "present_value"}
    tokens = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    caches = [port for port in inputs if port.layer is not None]
    state = {p.name: np.zeros([0 if s == "past_length" else s for s in p.shape], np.float32) for p in caches}
    past = 0
    for new in (1, 6, 1, 16):
        feed = dict(state)
        for port in inputs:
            if port.role == "tokens":
                feed[port.name] = tokens[:, past : past + new].numpy()
            elif port.role == "positions":
                feed[port.name] = np.arange(past, past + new)[None]
            else:
                assert port.layer is not None, f"input {port.name} is of no known role"
        found = dict(zip([port.name for port in outputs], session.run([p.name for p in outputs], feed), strict=True))
        close(found["logits"], expected[:, past : past + new])
        state = {port.name: found[f"output.{port.path}"] for port in caches}
        past += new


def check_encoder(session, inputs: list[Port], outputs: list[Port], model: torch.nn.Module) -> None:
    tokens = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(6))
    values = {"tokens": tokens, "mask": torch.ones_like(tokens), "token_types": (tokens > 200).long()}
    values["mask"][2, 9:] = 0
    feed = {port.name: values[port.role] for port in inputs}
    with torch.no_grad():
        expected = model(**feed)
    for port, found in zip(outputs, session.run(None, {k: v.numpy() for k, v in feed.items()}), strict=True):
        wanted = expected[port.path]
        if port.role == "hidden":
            # What stands at padded places means nothing.
            found, wanted = found[values["mask"].bool().numpy()], wanted[values["mask"].bool()]
        close(found, wanted)


def test_ports_of_a_decoder() -> None:
    inputs, outputs = program_ports(analysed("llama").prepared.export_torch(), analysed("llama").prepared)
    assert [(port.path, port.role, port.layer, port.shape) for port in inputs] == [
        ("input_ids", "tokens", None, (1, "length")),
        ("position_ids", "positions", None, (1, "length")),
        ("past_key_values.layers.0.keys", "past_key", 0, (1, 2, "past_length", 64)),
        ("past_key_values.layers.0.values", "past_value", 0, (1, 2, "past_length", 64)),
        ("past_key_values.layers.1.keys", "past_key", 1, (1, 2, "past_length", 64)),
        ("past_key_values.layers.1.values", "past_value", 1, (1, 2, "past_length", 64)),
    ]
    assert [(port.path, port.role, port.layer, port.shape) for port in outputs] == [
        ("logits", "logits", None, (1, "length", VOCABULARY)),
        ("past_key_values.layers.0.keys", "present_key", 0, (1, 2, "total_length", 64)),
        ("past_key_values.layers.0.values", "present_value", 0, (1, 2, "total_length", 64)),
        ("past_key_values.layers.1.keys", "present_key", 1, (1, 2, "total_length", 64)),
        ("past_key_values.layers.1.values", "present_value", 1, (1, 2, "total_length", 64)),
    ]


class Broken(Passes):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def quantize(self, model, sample_inputs, export_format):
        raise self.error


@pytest.mark.parametrize("error", [GateError("a gate"), RuntimeError("a bug of ours")])
def test_a_failing_pass_is_not_taken_for_a_model_that_cannot_be_exported(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        prepare(torch.nn.Linear(4, 4), torch.ones(2, 4)).export_onnx(Broken(error))


class Named(Passes):
    """Looks at what torch's names stand for, and passes on."""

    def quantize(self, model, sample_inputs, export_format):
        self.seen = torch_names()
        self.draws = [torch.randperm(100, generator=torch.Generator().manual_seed(7)).tolist() for _ in range(2)]
        return model


def torch_names() -> tuple:
    return (torch.randperm, torch.exp, torch.Tensor.exp, torch.where, torch.searchsorted, torch.Tensor.reshape, torch.full,
            torch.split, torch.nn.functional.scaled_dot_product_attention)  # fmt: skip


@pytest.mark.parametrize("export", ["export_onnx", "export_torch"])
def test_passes_see_torch_as_it_is_and_not_as_the_exporter_has_it(export: str) -> None:
    before, passes = torch_names(), Named()
    getattr(prepare(torch.nn.Linear(4, 4), torch.ones(2, 4)), export)(passes)
    assert all(ours is theirs for ours, theirs in zip(passes.seen, before, strict=True))
    assert passes.draws[0] == passes.draws[1]
    assert all(now is then for now, then in zip(torch_names(), before, strict=True))
