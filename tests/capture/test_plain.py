"""Plain modules with inputs that their author gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.capture.capture import capture, captured
from qcompiler.capture.dimensions import ports, program_ports
from qcompiler.capture.prepare import prepare
from qcompiler.errors import InputError, UnsupportedError, UsageError
from tests.captures import ANALYSE, NORMALISE, run


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        z = self.second(torch.relu(self.first(x))) * scale
        return {"z": z if y is None else z + y}


@pytest.mark.parametrize(
    "example",
    [torch.randn(3, 8), (torch.randn(3, 8),), (torch.randn(3, 8), torch.randn(3, 4)), {"x": torch.randn(3, 8)},
     {"x": torch.randn(3, 8), "y": torch.randn(3, 4)}],
)  # fmt: skip
def test_the_batch_varies_whatever_the_example_looks_like(example: object) -> None:
    module = Two()
    graph = capture(module, example)
    run(graph, NORMALISE + ANALYSE)
    assert [site.name for site in graph.sites] == ["first", "second"]
    feed = {name: torch.randn(7, *tensor.shape[1:]) for name, tensor in graph.example.items()}
    torch.testing.assert_close(graph.module(**feed), module(**feed))


def test_one_row_fixes_the_shape_and_is_noted() -> None:
    prepared = prepare(Two(), torch.randn(1, 8))
    assert prepared.notes == ["no example input has two rows: every axis is fixed"]
    (port,) = ports(prepared.export_onnx())[0]
    assert port.shape == (1, 8)


def test_the_user_names_the_axes_that_vary() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    prepared = prepare(Two(), {"x": torch.randn(2, 5, 8)}, {"x": {1: length}})
    assert prepared.axes == {"x": {1: "length"}}
    inputs, outputs = ports(prepared.export_onnx())
    assert [port.shape for port in (*inputs, *outputs)] == [(2, "length", 8), (2, "length", 4)]


def test_ports_of_a_torch_program() -> None:
    prepared = prepare(Two(), {"x": torch.randn(2, 8), "y": torch.randn(2, 4), "scale": 0.5})
    inputs, outputs = program_ports(prepared.export_torch(), prepared)
    assert [(port.name, port.shape, port.dtype) for port in inputs] == [
        ("x", ("batch", 8), "float32"), ("y", ("batch", 4), "float32")
    ]  # fmt: skip
    assert [(port.path, port.shape) for port in outputs] == [("z", ("batch", 4))]


def test_training_mode_is_left_behind() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), torch.randn(2, 4))
    x = torch.ones(2, 4)
    assert torch.equal(graph.module(input=x), graph.module(input=x))


@pytest.mark.parametrize(
    "module, example, shapes, message",
    [
        (Two(), None, None, "Two is no transformers model: give example inputs"),
        (Two(), (torch.randn(2, 8),) * 3, None, "do not fit Two.forward: too many positional arguments"),
        (Two(), {"w": torch.randn(2, 8)}, None, "do not fit Two.forward"),
        (Two(), {"x": 3}, None, "hold no tensor"),
        (Two(), torch.randn(2, 8), {"w": {0: None}}, r"dynamic_shapes names \['w'\], which are no inputs"),
        (Two(), None, {"x": {}}, "dynamic_shapes belongs to example inputs"),
    ],
)
def test_a_call_that_makes_no_sense(module: nn.Module, example: object, shapes: dict | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(module, example, shapes)


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.sum().item())]


def test_what_cannot_be_traced_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="DataDependent: cannot be exported to ONNX: .*data-dependent"):
        prepare(DataDependent(), torch.ones(2)).export_onnx()
    assert capfd.readouterr().out == ""


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise InputError("something of ours")


def test_our_own_errors_are_not_wrapped() -> None:
    with pytest.raises(InputError, match="^something of ours$"):
        captured(prepare(Failing(), torch.ones(2, 2)))
