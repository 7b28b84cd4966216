"""What a segment takes on a device: the estimate beside what is counted there, cuts that make it fit, and the refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qcompiler.errors import CapacityError
from qcompiler.graph.graph import Graph
from qcompiler.passes.observe.guide import Guide
from qcompiler.passes.solve.bias_correction import BiasCorrection
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.gptvq import Gptvq
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.passes.transform.awq import Awq
from qcompiler.pipeline.context import Context
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Pass
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Select
from qcompiler.sweep import Sweep, room
from qcompiler.sweep.budget import Costs
from tests.calibrated import calibrated
from tests.runtime.fake_gpu import fake_gpus
from tests.sweep.live_bytes import Counted
from tests.sweep.other_device import NAME

WIDTH, HIDDEN = 256, 512
# An estimate is at least what is counted, and at most this many times as much.
FACTOR = 2.0
INT4: dict[str, Any] = {"bits": 4, "group": 32, "activations": "float"}
RECIPE: dict[str, Any] = {"allow": {"min_coverage": 0, "fallbacks": 99}}
VQ2: dict[str, Any] = {"vq": "vq2", "activations": "float"}
Q = Select(name="q")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        h = x + self.o(torch.sigmoid(self.q(n)) * self.v(n))
        return h + self.down(torch.relu(self.up(h)))


def made(linear: dict[str, Any], tokens: int = 32) -> tuple[Graph, Context]:
    torch.manual_seed(0)
    graph, context = calibrated(linear, Block().eval(), [torch.randn(tokens, WIDTH) for _ in range(2)], **RECIPE)
    samples = list(context.samples())
    context.samples = lambda: samples
    return graph, context


def slow(*values: Any, id: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


CASES = [
    pytest.param(INT4, [Gptq(select=Select(name="down"))], 32, id="gptq"),
    pytest.param(INT4, [Guide(groups=2)], 512, id="gradients"),
    pytest.param(INT4, [Guide(groups=2), Gptq(guided=True, select=Q)], 32, id="guided"),
    pytest.param(VQ2, [Gptvq(select=Q, iterations=2)], 32, id="gptvq"),
    pytest.param(INT4, [Awq()], 32, id="awq"),
    pytest.param(INT4, [RoundToNearest(), BiasCorrection()], 4096, id="two streams of long samples"),
    slow(INT4, [Gptq()], 32, id="gptq of every layer"),
    slow(INT4, [Guide(groups=2), Gptq(guided=True)], 32, id="guided, every layer"),
    slow(INT4, [Gptq(asymmetric=True)], 32, id="gptq against the float stream"),
    slow(VQ2 | {"vq": "vq4"}, [Guide(groups=2), Gptvq(select=Q, iterations=2, guided=True)], 32, id="guided gptvq"),
    slow(VQ2, [Gptvq(select=Q, iterations=2, asymmetric=True)], 32, id="gptvq against the float stream"),
    slow(VQ2 | {"vq": "vq2-4d"}, [Gptvq(select=Q, iterations=2)], 32, id="gptvq of four dimensions"),
    slow(VQ2 | {"vq": "nf4"}, [Gptvq(select=Q)], 32, id="gptvq with a fixed table"),
    slow(INT4, [Awq(clipping="mse", steps=4)], 32, id="awq, clipped by error"),
]


@pytest.mark.parametrize("linear, steps, tokens", CASES)
def test_the_estimate_is_what_is_counted(
    linear: dict[str, Any], steps: list[Pass], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, context = made(linear, tokens)
    context.device = NAME
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**50)
    found: list[int] = []
    check = room.check_segments

    def checked(device: Any, order: Any, cuts: Any, parts: Any, what: str = "") -> None:
        check(device, order, cuts, parts, what)
        found.append(max(sum(parts(stretch).values()) for stretch in order.stretches(cuts)))

    for where in ("budget", "backward_plan"):
        monkeypatch.setattr(f"qcompiler.sweep.{where}.check_segments", checked)
    with Counted() as mode:
        PassManager(Trace()).run(graph, context, steps[:-1])
        mode.restart()
        PassManager(Trace()).run(graph, context, steps[-1:])
    assert mode.peak <= found[-1] <= FACTOR * mode.peak, f"{found[-1] / mode.peak:.2f} times {mode.peak:,} bytes"


ROUNDED = [INT4] + [pytest.param(case, marks=pytest.mark.slow) for case in (
    VQ2, INT4 | {"bits": 8, "group": 0}, INT4 | {"bits": 3, "symmetric": False}, VQ2 | {"vq": "vq4"}, VQ2 | {"vq": "vq1d-4"},
    VQ2 | {"vq": "nf4"},
)]  # fmt: skip


@pytest.mark.parametrize("linear", ROUNDED, ids=str)
def test_of_layers_that_are_rounded_one_by_one_the_largest_counts(
    linear: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, context = made(linear)
    context.device = NAME
    found: list[int] = []
    monkeypatch.setattr(
        "qcompiler.passes.solve.round_to_nearest.check_layers", lambda device, sizes, what: found.append(max(sizes.values()))
    )
    with Counted() as mode:
        PassManager(Trace()).run(graph, context, [RoundToNearest(iterations=2)])
    assert mode.peak <= found[-1] <= FACTOR * mode.peak, f"{found[-1] / mode.peak:.2f} times {mode.peak:,} bytes"


def test_what_is_let_go_is_not_counted() -> None:
    """The counter itself: two that live at once, a view, one that is gone."""
    with Counted() as mode:
        x = torch.zeros(1000).to(NAME)
        y = x[:10] + 1
        assert mode.peak == 4040
        del x
        z = torch.ones(100, device=NAME)
        assert mode.peak == 4040 and mode.restart() == 4040
        w = torch.ones(1000, device=NAME)
        assert mode.peak == y.numel() * 4 + z.numel() * 4 + w.numel() * 4


def test_a_layer_that_does_not_fit_is_refused_before_anything_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose GPU is only said to be there, anything that was moved would be another error."""
    graph, context = made(INT4)
    context.device = "cuda"
    fake_gpus(monkeypatch, free=4 * 2**20, triton=False)
    with pytest.raises(CapacityError) as refused:
        PassManager(Trace()).run(graph, context, [Gptq()])
    message = str(refused.value)
    assert message.startswith("solving down needs 10.1 MiB on cuda (the solver 9.0 MiB, statistics 1.0 MiB, quantized layers ")
    assert "only 3.6 MiB are free: 6.5 MiB too little; give shorter samples" in message and "--device cpu" in message
    with pytest.raises(CapacityError, match=r"rounding (up|down) needs 4.0 MiB .*: 0.4 MiB too little"):
        PassManager(Trace()).run(graph, context, [RoundToNearest()])
    graph, context = made(INT4)
    context.device = "cuda"
    fake_gpus(monkeypatch, free=2**20, triton=False)
    with pytest.raises(CapacityError, match=r"gradients through .* needs .* too little"):
        PassManager(Trace()).run(graph, context, [Guide(groups=2)])


def test_segments_are_cut_where_that_makes_them_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is for weights that stay from sample to sample."""
    graph, context = made(INT4)
    costs = Costs(segment=lambda site: 2**20)
    whole = Sweep(graph, context, graph.sites, costs=costs, cuts=lambda order: [])
    need = sum(room.segment_parts(whole, whole.stretches[0], costs).values())
    context.device = "cuda"
    fake_gpus(monkeypatch, free=int(need / room.SHARE) + 2**10, triton=False)
    kept = Sweep(graph, context, graph.sites, costs=costs, cuts=lambda order: [])
    assert len(kept.stretches) == 1 and 0 <= kept._plan.cache_bytes < 2**10
    fake_gpus(monkeypatch, free=int(need / room.SHARE) - 2**10, triton=False)
    cut = Sweep(graph, context, graph.sites, costs=costs, cuts=lambda order: [])
    assert len(cut.stretches) == 2 and cut._plan.cache_bytes > 0


def test_of_a_cpu_nothing_is_asked() -> None:
    graph, context = made(INT4)
    assert Sweep(graph, context, graph.sites, costs=Costs(solver=lambda group: 2**60))._plan.cache_bytes == 2**62
