"""Every architecture compiles to int4 and computes in ONNX Runtime what its own fake-quantized torch graph computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.capture.feeds import feed
from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_nbit import quantize_activations
from qcompiler.runtime.session import Session
from tests.captures import Analysed, analysed
from tests.models import ALWAYS, EXHAUSTIVE, is_decoder
from tests.pipeline.rewire import float_artifact

LENGTH = 24
FLOAT = 1e-4  # relative to the largest output
# Where activations are rounded, one that lies between two integers takes either, and what follows differs. How much that is in a
# model is measured: sums in another order, about NOISE apart, in as many runs as see it happen. The bound is above INT8 only
# where those are.
INT8, NOISE, RUNS, MARGIN = 2e-2, 1e-6, 8, 1.5


class FakeQuantized(Interpreter):
    """The float graph with every solved site replaced by float arithmetic on rounded numbers: no kernel of ours."""

    def __init__(
        self, captured: Analysed, solutions: dict, schemes: dict, float_activations: bool, noise: torch.Generator | None = None
    ):
        super().__init__(captured.graph.module)
        self.noise = noise
        self.sites = {s.node: s for s in captured.graph.sites if s.name in solutions}
        self.weights = {name: solution.dequantize() for name, solution in solutions.items()}
        self.schemes, self.float_activations = schemes, float_activations

    def run_node(self, node: Node):
        if node not in self.sites:
            return super().run_node(node)
        y = self.site(node)
        return y if self.noise is None else y * (1 + NOISE * torch.randn(y.shape, generator=self.noise))

    def site(self, node: Node) -> torch.Tensor:
        site = self.sites[node]
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        weight = self.weights[site.name]
        if site.kind == "embedding":
            return torch.nn.functional.embedding(arguments[1], weight)
        bias = arguments[3 if site.kind == "experts" else 2 :]
        x, activation = arguments[0], self.schemes[site.name].activation
        if activation is not Activation.FLOAT and not self.float_activations:
            q, scale = quantize_activations(x.reshape(-1, x.shape[-1]).numpy(), activation)
            x = torch.from_numpy(q * scale).reshape(x.shape)
        if site.kind == "experts":  # a matrix for each row
            y = torch.einsum("rk,rnk->rn", x, weight[arguments[1]])
            return y + bias[0][arguments[1]] if bias else y
        return torch.nn.functional.linear(x, weight, *bias)


def outputs(artifact: Path, tokens: np.ndarray, decoder: bool) -> np.ndarray:
    session = Session(artifact, threads=1)
    if decoder:  # in pieces, so that the cache is read as well as written
        logits = [session.prefill(tokens[: LENGTH - 2]), session.step(tokens[-2]), session.step(tokens[-1])]
        return np.stack([np.atleast_2d(piece)[-1] for piece in logits])
    return next(iter(session.run(input_ids=tokens[None]).values()))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_computes_what_its_graph_does(artifact: Path, captured: Analysed, context, model_type: str) -> None:
    """With float activations the same numbers; with rounded ones no farther from the graph's than sums in another order get."""
    decoder = is_decoder(model_type)
    tokens = np.random.default_rng(0).integers(3, 512, LENGTH)
    feeds = _pytree.tree_leaves(feed(captured.prepared, torch.from_numpy(tokens)[None]))

    def expected(float_activations: bool, noise: torch.Generator | None = None) -> np.ndarray:
        fake = FakeQuantized(captured, context.solutions, context.schemes, float_activations, noise)
        with torch.no_grad():
            logits = _pytree.tree_leaves(fake.run(*feeds))[0].numpy()
        return logits[0, -3:] if decoder else logits

    as_floats = outputs(float_artifact(artifact, artifact.parent / "float"), tokens, decoder)
    assert relative(as_floats, expected(True)) <= FLOAT
    rounded = expected(False)
    apart = max(relative(expected(False, torch.Generator().manual_seed(seed)), rounded) for seed in range(RUNS))
    bound = max(FLOAT, min(MARGIN * apart, max(INT8, apart)))
    assert relative(outputs(artifact, tokens, decoder), rounded) <= bound


@pytest.mark.parametrize("model_type", [*ALWAYS, *(pytest.param(t, marks=pytest.mark.slow) for t in EXHAUSTIVE)])
def test_int4(model_type, tmp_path):
    captured = analysed(model_type)
    recipe = recipes.load("int4")
    result = qcompiler.compile(captured.model, output=tmp_path / "out", recipe=recipe, samples=0)
    context = result.quantizer.context
    assert {s.name for s in captured.graph.sites} == {s.name for s in result.quantizer.graph.sites}

    totals = result.layers["totals"]
    assert totals["coverage"] == 1 and result.layers["left_in_float"] == []

    assert_computes_what_its_graph_does(tmp_path / "out", captured, context, model_type)
