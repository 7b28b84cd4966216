"""Calibration and solvers on another device: every tensor that takes part was moved there, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.errors import UnsupportedError
from qcompiler.graph.graph import Graph
from qcompiler.passes.observe.guide import Guide
from qcompiler.passes.solve.bias_correction import BiasCorrection
from qcompiler.passes.solve.clip_search import ClipSearch
from qcompiler.passes.solve.distill_blocks import DistillBlocks
from qcompiler.passes.solve.distill_end_to_end import DistillEndToEnd
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.gptvq import Gptvq
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.passes.transform.awq import Awq
from qcompiler.passes.transform.smooth_quant import SmoothQuant
from qcompiler.pipeline.context import Context
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Pass
from qcompiler.pipeline.probe import output_sqnr
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select
from qcompiler.sweep.place import moved, working_on
from qcompiler.sweep.solutions import Solution, to_tensors
from tests.calibrated import calibrated
from tests.passes.scaled import INT8, prepared
from tests.runtime.fake_gpu import fake_gpus
from tests.sweep.other_device import NAME, OtherDevice, There

FLOAT = {"bits": 3, "group": 32, "activations": "float"}
INT4 = {"bits": 4, "group": 32}
VQ2 = {"vq": "vq2", "activations": "float"}
Made = Callable[[], tuple[Graph, Context]]
RECIPE: dict[str, Any] = {"allow": {"min_coverage": 0, "fallbacks": 99}}


def slow(*values: Any, id: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


CASES = [
    pytest.param(lambda: calibrated(FLOAT, **RECIPE), [Gptq()], id="gptq"),
    pytest.param(lambda: calibrated(FLOAT, **RECIPE), [RoundToNearest(), BiasCorrection()], id="bias"),
    pytest.param(lambda: prepared(INT8, 20.0, **RECIPE), [SmoothQuant(), RoundToNearest()], id="smooth"),
    pytest.param(lambda: calibrated(FLOAT, **RECIPE), [Guide(labels="sampled", groups=2), Gptq(guided=True)], id="guided"),
    pytest.param(lambda: calibrated(VQ2, **RECIPE), [Gptvq(iterations=4, select=Select(name="q"))], id="gptvq"),
    slow(lambda: calibrated(VQ2, **RECIPE), [Guide(labels="sampled"), Gptvq(iterations=4, guided=True)], id="guided gptvq"),
    slow(lambda: calibrated(VQ2, **RECIPE), [Gptvq(iterations=4, asymmetric=True)], id="gptvq against the float stream"),
    slow(lambda: calibrated(VQ2 | {"vq": "nf4"}, **RECIPE), [Gptvq()], id="gptvq with a fixed table"),
    slow(lambda: calibrated(VQ2 | {"vq": "vq2-4d"}, **RECIPE), [RoundToNearest()], id="codebooks of the weight"),
    slow(lambda: calibrated(FLOAT, **RECIPE), [Gptq(asymmetric=True)], id="gptq against the float stream"),
    slow(lambda: calibrated(FLOAT, **RECIPE), [ClipSearch()], id="clip"),
    slow(lambda: prepared(INT4, 20.0, **RECIPE), [Awq(), RoundToNearest()], id="awq"),
    slow(lambda: calibrated(FLOAT, **RECIPE), [RoundToNearest(), DistillBlocks(steps=4)], id="blocks"),
    slow(lambda: calibrated(FLOAT, **RECIPE), [RoundToNearest(), DistillEndToEnd(steps=4)], id="end to end"),
]  # fmt: skip


def solved(made: Made, steps: list[Pass], device: str | None) -> tuple[Context, OtherDevice | None]:
    graph, context = made()
    samples = list(context.samples())
    context.samples = lambda: samples
    if device is None:
        PassManager(Trace()).run(graph, context, steps)
        return context, None
    context.device = device
    with OtherDevice() if device == NAME else nullcontext() as mode:
        PassManager(Trace()).run(graph, context, steps)
    for node in graph.nodes:
        if node.op == "get_attr":
            assert not isinstance(graph.stored(str(node.target)), There), f"{node.target} stayed on the device"
    return context, mode


@pytest.mark.parametrize("made, steps", CASES)
def test_everything_is_moved_and_the_solutions_are_equal_to_the_bit(made: Made, steps: list[Pass]) -> None:
    here, _ = solved(made, steps, None)
    there, mode = solved(made, steps, NAME)
    assert here.solutions.keys() == there.solutions.keys() and here.solutions
    for name, solution in here.solutions.items():
        for kind, tensor in to_tensors(solution).items():
            other = to_tensors(there.solutions[name])[kind]
            assert not isinstance(other, There) and torch.equal(tensor, other), (name, kind)
    assert mode is not None and sum(mode.ops.values()) > 1000


@pytest.mark.parametrize(
    "linear", [{"bits": 4, "group": 32}, slow({"bits": 8, "activations": "int8-token"}, id="a scale a token")]
)
def test_the_layers_errors_are_measured_there(linear: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decibels; where a sample does not fit, on the CPU, and it is said."""
    graph, context = calibrated(linear, **RECIPE)
    samples = list(context.samples())
    PassManager(Trace()).run(graph, context, [RoundToNearest()])
    here = output_sqnr(graph, context, samples)
    context.device = NAME
    with OtherDevice() as mode:
        assert output_sqnr(graph, context, samples) == here and len(here) == 7
    assert sum(mode.ops.values()) > 100
    notes: list[str] = []
    monkeypatch.setattr(context.reporter, "note", notes.append, raising=False)
    monkeypatch.setattr("qcompiler.pipeline.probe.free_bytes", lambda device: 2**10)
    with OtherDevice() as mode:
        assert output_sqnr(graph, context, samples) == here
    assert not mode.ops and len(notes) == 1 and notes[0].endswith("1,024 are free on meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("made, steps", CASES)
def test_on_a_gpu_the_weights_are_as_near(made: Made, steps: list[Pass]) -> None:
    """Sums in another order round some codes elsewhere; the squared distance from the weights is the same within 2 %."""
    graph, _ = made()
    here, there = solved(made, steps, None)[0], solved(made, steps, "cuda")[0]
    for name, solution in here.solutions.items():
        weight = graph.constant(graph.site(name).weight)
        assert _distance(there.solutions[name], weight) == pytest.approx(_distance(solution, weight), rel=0.02)


def _distance(solution: Solution, weight: torch.Tensor) -> float:
    return float((solution.dequantize() - weight).square().sum())


def test_a_tensor_that_was_left_behind_is_found() -> None:
    """The check itself: what was not moved, draws of the wrong generator, and numbers that never arrived."""
    with OtherDevice():
        there = torch.ones(3).to(NAME)
        with pytest.raises(AssertionError, match="were not moved"):
            there + torch.ones(3)
        with pytest.raises(AssertionError, match="generator of the CPU"):
            torch.rand(3, generator=torch.Generator(), device=NAME)
        with pytest.raises(TypeError, match="no array"):
            there.numpy()
        with working_on(NAME):
            assert isinstance(torch.zeros(2), There) and torch.tensor([1.0, 2.0]).tolist() == [1.0, 2.0]
        assert moved({"x": [there, 1]}, "cpu")["x"][0].tolist() == [1.0] * 3
    assert working_on("cpu").__enter__() is None


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, count=0)
    with pytest.raises(UnsupportedError, match="torch finds no GPU"):
        qcompiler.compile("no such model", output=tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
