"""Calibration samples that the caller gives to `compile`: of plain modules, of models that take tokens; and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.errors import InputError, QCompilerError, UsageError
from tests.models import VOCABULARY, tiny

STATIC = {"bits": 8, "activations": "int8-static"}
RECIPE: dict[str, Any] = {
    "name": "static", "linear": STATIC, "embed": {"bits": 8}, "head": STATIC,
    "passes": ["round_to_nearest", "place_observers", {"calibrate_ranges": {"method": "minmax", "symmetric": True}}],
}  # fmt: skip


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)) * gain)


def sample(largest: float, rows: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(int(largest))).clamp(-1, 1)
    x[0, 3] = largest
    return x.to(dtype), torch.ones(1, 48, dtype=dtype)


def compiled(path: Path, calibration: Iterable[Any], module: nn.Module | None = None, **more: Any) -> qcompiler.CompileResult:
    given = {"example": sample(1.0, dtype=next((module or Network()).parameters()).dtype), **more}
    return qcompiler.compile(
        module or Network().eval(), output=path / "out", recipe=RECIPE, target="torch", calibration=calibration, **given
    )


def scale(result: qcompiler.CompileResult) -> float:
    """Of the first layer's activations."""
    return float(result.quantizer.context.static_ranges["up"][0])


def test_static_ranges_are_those_of_the_samples(tmp_path: Path) -> None:
    """Symmetric ranges end at the largest magnitude seen, over 127."""
    asked = [sample(3.0), dict(zip(("x", "gain"), sample(-9.0, rows=5), strict=True)), sample(4.0)]
    result = compiled(tmp_path, asked)
    assert scale(result) == pytest.approx(9 / 127)
    assert result.quantizer.recipe.calibration.samples == 3


def test_what_can_be_read_once_is_kept_and_cut_where_asked(tmp_path: Path) -> None:
    assert scale(compiled(tmp_path, (sample(largest) for largest in (2.0, 5.0, 8.0)), samples=2)) == pytest.approx(5 / 127)


def test_samples_of_a_module_in_half_precision(tmp_path: Path) -> None:
    module = Network().eval().to(torch.bfloat16)
    assert scale(compiled(tmp_path, [sample(6.0, dtype=torch.bfloat16)], module)) == pytest.approx(6 / 127)


def test_tokens_calibrate_a_model_in_memory(tmp_path: Path) -> None:
    model = tiny("llama")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 24)
    ranges = []
    for name, samples in (
        ("rows", [tokens]),
        ("mapping", [{"input_ids": torch.from_numpy(tokens)[None]}]),
        ("cut", [tokens[:4]]),
    ):
        result = qcompiler.compile(model, output=tmp_path / name, recipe=RECIPE, target="torch", calibration=samples)
        ranges.append({site: step for site, (step, _) in result.quantizer.context.static_ranges.items()})
    assert ranges[0] == ranges[1]
    # Fewer tokens never have a wider range, where a token sees the same before it.
    first = "model.layers.0.self_attn.q_proj"
    assert ranges[2][first] < ranges[0][first]


@pytest.mark.parametrize(
    "calibration,error,message",
    [
        ([], InputError, "calibration holds no sample"),
        (sample(1.0)[0], UsageError, "calibration is one Tensor; expected an iterable of samples"),
        ([sample(1.0), (torch.ones(2, 63), torch.ones(1, 48))], InputError, r"sample 1: x is torch.float32 \[2, 63\], "),
        ([{"x": torch.ones(2, 64)}], InputError, "sample 0: the example inputs do not fit Network.forward: missing"),
        ([(torch.ones(2, 64, dtype=torch.int64), torch.ones(1, 48))], InputError, r"sample 0: x is torch.int64 \[2, 64\]"),
    ],
)  # fmt: skip
def test_what_the_graph_does_not_take_is_refused(
    calibration: Any, error: type[QCompilerError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        compiled(tmp_path, calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "calibration,message",
    [
        ([np.ones((2, 5), np.int64)], r"sample 0 is int64 \[2, 5\], expected token ids"),
        ([np.ones(5, np.float32)], r"sample 0 is float32 \[1, 5\], expected token ids"),
        ([{"ids": [1, 2]}], r"sample 0 has no 'input_ids'; found \['ids'\]"),
        (["text"], "sample 0 is str, expected token ids"),
    ],
)
def test_what_are_no_tokens_is_refused(calibration: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        qcompiler.compile(tiny("llama"), output=tmp_path / "out", recipe=RECIPE, target="torch", calibration=calibration)


def test_samples_and_windows_of_text_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text, length and seed choose windows of text"):
        compiled(tmp_path, [sample(1.0)], length=8)
