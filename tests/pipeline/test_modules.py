"""Plain modules from end to end: odd widths, every target, a batch of any size; and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.errors import GateError, InputError, UsageError
from qcompiler.runtime import options
from qcompiler.runtime.artifact import open_artifact, verify_files
from qcompiler.runtime.session import Session
from tests.pipeline.fake_quantized import fake_quantized

# Relative to the largest output. Stock ONNX Runtime rounds activations in other blocks than our kernels do.
EXACT, STOCK = 1e-4, 3e-2
WIDTHS = (100, 77, 33, 5)  # none a multiple of 16
TARGETS = ("onnx", "onnx-stock", "torch")


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first, second, third, last = WIDTHS
    return nn.Sequential(
        nn.Linear(first, second, bias=bias), nn.ReLU(), nn.Linear(second, third, bias=not bias), nn.GELU(),
        nn.Linear(third, last, bias=bias),
    ).eval()  # fmt: skip


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, WIDTHS[0], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> qcompiler.CompileResult:
    output = tmp_path_factory.mktemp("modules") / "out"
    return qcompiler.compile(network(), output=output, example=(rows(3),), recipe="int4", target=request.param)


def run(session: Session, x: torch.Tensor) -> np.ndarray:
    (port,), (output,) = session.artifact.inputs, session.artifact.outputs
    return session.run(**{port.name: x.numpy()})[output.name]


def relative(found: np.ndarray, expected: Any) -> float:
    expected = expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_it_computes_the_rounded_module(compiled: qcompiler.CompileResult) -> None:
    """Every batch, also sizes that the example did not have."""
    expected = fake_quantized(network(), compiled.quantizer)
    session = Session(compiled.path, threads=1)
    bound = STOCK if compiled.manifest["target"] == "onnx-stock" else EXACT
    for count in (1, 2, 3, 17):
        assert relative(run(session, rows(count)), expected(rows(count))) <= bound, count


def test_it_is_near_the_module(compiled: qcompiler.CompileResult) -> None:
    assert relative(run(Session(compiled.path, threads=1), rows(64)), network()(rows(64))) < 0.25


def test_records(compiled: qcompiler.CompileResult) -> None:
    assert verify_files(open_artifact(compiled.path)) > 5
    manifest = compiled.manifest
    assert (manifest["kind"], manifest["cache"], manifest["context"], manifest["tokens"]) == (
        "module",
        None,
        None,
        None,
    )
    assert manifest["model"] == {
        "source": "Sequential",
        "type": "Sequential",
        "parameters": sum(p.numel() for p in network().parameters()),
    }
    assert [port["shape"] for port in (*manifest["inputs"], *manifest["outputs"])] == [["batch", 100], ["batch", 5]]
    assert [layer["shape"] for layer in compiled.layers["layers"]] == [[77, 100], [33, 77], [5, 33]]
    assert compiled.layers["totals"]["coverage"] == 1 and compiled.layers["left_in_float"] == []


def test_wrong_inputs_are_named(compiled: qcompiler.CompileResult) -> None:
    session = Session(compiled.path, threads=1)
    (port,) = session.artifact.inputs
    with pytest.raises(UsageError, match=rf"{port.name} has shape \[2, 99\], expected \['batch', 100\]"):
        session.run(**{port.name: np.zeros((2, 99), np.float32)})
    with pytest.raises(UsageError, match=f"the input {port.name} .*is missing"):
        session.run()


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases the other way round, float activations, and no kernel of ours."""
    monkeypatch.setattr(options, "_warned_portable", False)  # a process is told once
    module = network(bias=False)
    result = qcompiler.compile(module, output=tmp_path / "out", example={"input": rows(2)}, recipe="int4-weights")
    with pytest.warns(RuntimeWarning, match="without the op library"):
        session = Session(result.path, threads=1, portable=True)
    expected = fake_quantized(module, result.quantizer)(rows(9))
    assert relative(run(session, rows(9)), expected) <= EXACT
    assert relative(run(Session(result.path, threads=1), rows(9)), expected) <= EXACT


def refused(error: type[Exception], message: str, tmp_path: Path, module: nn.Module, **options: Any) -> None:
    with pytest.raises(error, match=message):
        qcompiler.compile(module, output=tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_nothing_to_quantize(tmp_path: Path) -> None:
    refused(
        GateError,
        "pass assign_formats matched nothing",
        tmp_path,
        nn.Sequential(nn.ReLU(), nn.Tanh()),
        example=(rows(2),),
    )


def test_no_example(tmp_path: Path) -> None:
    refused(UsageError, "Sequential is no transformers model: give example inputs", tmp_path, network())


@pytest.mark.parametrize("value,word", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_weight_that_is_no_number(tmp_path: Path, value: float, word: str) -> None:
    module = network()
    with torch.no_grad():
        module[2].weight[3, 4] = value
    refused(InputError, f"Sequential: weight 2.weight holds {word}", tmp_path, module, example=(rows(2),))


def test_strict_groups(tmp_path: Path) -> None:
    message = "layer 0: rows of 100 do not divide into groups of 32"
    refused(UsageError, message, tmp_path, network(), example=(rows(2),), strict_groups=True)
