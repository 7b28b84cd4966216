"""Plain modules of forms that nobody writes on purpose: bare parameters, vectors, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import qcompiler
from qcompiler.errors import UnsupportedError
from qcompiler.runtime.session import Session

RECIPE = {"name": "eight", "linear": {"bits": 8, "group": 32}, "embed": {"bits": 8, "group": 32}}
NEAR = 2e-2  # of eight bits, relative to the largest output


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(module: nn.Module, tmp_path: Path, example: Any, **options: Any) -> tuple[qcompiler.CompileResult, Session]:
    result = qcompiler.compile(module, output=tmp_path / "out", example=example, recipe=RECIPE, **options)
    return result, Session(result.path, threads=1)


def outputs(session: Session, *inputs: torch.Tensor) -> list[np.ndarray]:
    found = session.run(**{port.name: t.numpy() for port, t in zip(session.artifact.inputs, inputs, strict=True)})
    return [found[port.name] for port in session.artifact.outputs]


def assert_near(found: np.ndarray, expected: torch.Tensor, bound: float) -> None:
    wanted = expected.detach().float().numpy()
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


class Bare(nn.Module):
    """Weights of the outermost module, whole, transposed and in parts; one has the name of a tensor of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.scales = nn.Parameter(torch.randn(24, 72)), nn.Parameter(torch.randn(72, 24))
        self.fused, self.bias = nn.Parameter(torch.randn(48, 72)), nn.Parameter(torch.randn(48))
        self.table = nn.Parameter(torch.randn(72, 24))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = (functional.linear(x, self.fused[i : i + 24], self.bias[i : i + 24]) for i in (0, 24))
        looked_up = functional.embedding(ids, self.table)
        return functional.linear(x, self.plain), x @ self.scales, *parts, looked_up, self.plain.sum(0)


@pytest.mark.parametrize("target", ["onnx", "onnx-stock", "torch"])
def test_parameters_without_a_module_of_their_own(tmp_path: Path, target: str) -> None:
    module, ids = Bare().eval(), torch.tensor([3, 71, 0])
    result, session = compiled(module, tmp_path, (x(3, 72), ids), target=target)
    assert len(result.layers["layers"]) == 5 and result.layers["left_in_float"] == []
    assert {layer["name"] for layer in result.layers["layers"]} > {"plain", "scales", "table"}
    for found, wanted in zip(outputs(session, x(3, 72), ids), module(x(3, 72), ids), strict=True):
        assert_near(found, wanted, NEAR)


class Holding(nn.Module):
    """A layer that has tensors of its own where a packed weight would go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(72, 24)
        self.layer.scales = nn.Parameter(torch.rand(24) + 0.5)
        self.layer.register_buffer("codes", torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.layer.scales + self.layer.codes


def test_a_layer_with_tensors_of_our_names(tmp_path: Path) -> None:
    module = Holding().eval()
    _, session = compiled(module, tmp_path, x(3, 72))
    assert_near(outputs(session, x(5, 72))[0], module(x(5, 72)), NEAR)


class OfOneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(72, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[0])


@pytest.mark.parametrize("solver", ["round_to_nearest", "gptq"])
def test_a_vector_in_place_of_a_matrix(tmp_path: Path, solver: str) -> None:
    module = OfOneRow().eval()
    recipe = {**RECIPE, "passes": [solver]}
    result = qcompiler.compile(module, output=tmp_path / "out", example=x(3, 72), recipe=recipe)
    assert result.layers["layers"][0]["output_sqnr_db"] > 30
    assert_near(outputs(Session(result.path, threads=1), x(2, 72))[0], module(x(2, 72)), NEAR)


def tied(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(72, 72), nn.BatchNorm1d(72), nn.ReLU(), nn.Linear(72, 72))
    module[3].weight = module[0].weight
    return module.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_compiled_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Beside the caller's module, which stays as it is."""
    module = tied(dtype)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in module.state_dict().items()}
    result, session = compiled(module, tmp_path, x(3, 72).to(dtype))
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in module.state_dict().items()} == before
    assert module(x(2, 72).to(dtype)).dtype is dtype
    assert {port.dtype for port in (*session.artifact.inputs, *session.artifact.outputs)} == {"float32"}
    assert result.layers["layers"][0]["tie_group"] == result.layers["layers"][1]["tie_group"] is not None
    assert_near(outputs(session, x(5, 72))[0], module.double()(x(5, 72).double()), NEAR)


class Narrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(72, 24).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.half())


def test_code_that_insists_on_half_precision_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="layer layer: the model's own code gives it torch.float16 values"):
        compiled(Narrowing(), tmp_path, x(3, 72))
    assert list(tmp_path.iterdir()) == []


class WithANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(72, 24)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, flag: bool = False) -> torch.Tensor:
        return x[:, :24] if flag else self.layer(x) * scale


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_numbers_among_the_inputs_are_fixed(tmp_path: Path, target: str) -> None:
    _, session = compiled(WithANumber(), tmp_path, {"scale": 3.0, "x": x(3, 72), "flag": False}, target=target)
    assert_near(outputs(session, x(5, 72))[0], WithANumber()(x(5, 72), scale=3.0), NEAR)


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.each = nn.Linear(72, 24), nn.Parameter(torch.randn(3, 24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.layer(x), self.each)


def test_an_axis_that_the_module_holds(tmp_path: Path) -> None:
    """The message names the way out, which is one."""
    with pytest.raises(UnsupportedError, match=r"holds the batch of x at 3, .*: name the axes that vary in dynamic_shapes"):
        compiled(Batched().eval(), tmp_path, x(3, 5, 72))
    recipe = {**RECIPE, "allow": {"min_coverage": 0.4}}
    result = qcompiler.compile(Batched(), output=tmp_path / "out", example=x(3, 5, 72), recipe=recipe, dynamic_shapes={})
    assert result.manifest["inputs"][0]["shape"] == [3, 5, 72]


def test_sizes_of_small_layers_add_up(tmp_path: Path) -> None:
    """Tensors of up to 256 bytes lie in the graph; what is left in float are the two biases of more."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 100), nn.ReLU(), nn.Linear(100, 72))
    result, _ = compiled(module, tmp_path, x(3, 72))
    sizes = result.layers["totals"]["bytes"]
    files = sum((result.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert sizes["float"] == 4 * (100 + 72) and min(sizes.values()) >= 0
    assert sizes["total"] == files == sum(size for kind, size in sizes.items() if kind != "total")
