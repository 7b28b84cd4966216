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
FLOAT, INT8 = 1e-4, 2e-2  # relative to the largest output


class FakeQuantized(Interpreter):
    """The float graph with every solved site replaced by float arithmetic on rounded numbers: no kernel of ours."""

    def __init__(self, captured: Analysed, solutions: dict, schemes: dict, float_activations: bool):
        super().__init__(captured.graph.module)
        self.sites = {s.node: s for s in captured.graph.sites if s.name in solutions}
        self.weights = {name: solution.dequantize() for name, solution in solutions.items()}
        self.schemes, self.float_activations = schemes, float_activations

    def run_node(self, node: Node):
        site = self.sites.get(node)
        if site is None:
            return super().run_node(node)
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


@pytest.mark.parametrize("model_type", [*ALWAYS, *(pytest.param(t, marks=pytest.mark.slow) for t in EXHAUSTIVE)])
def test_int4(model_type, tmp_path):
    captured = analysed(model_type)
    recipe = recipes.load("int4")
    result = qcompiler.compile(captured.model, output=tmp_path / "out", recipe=recipe, samples=0)
    context = result.quantizer.context
    assert {s.name for s in captured.graph.sites} == {s.name for s in result.quantizer.graph.sites}

    totals = result.layers["totals"]
    assert totals["coverage"] == 1 and result.layers["left_in_float"] == []

    decoder = is_decoder(model_type)
    tokens = np.random.default_rng(0).integers(3, 512, LENGTH)
    feeds = _pytree.tree_leaves(feed(captured.prepared, torch.from_numpy(tokens)[None]))
    found = {
        "int8": outputs(tmp_path / "out", tokens, decoder),
        "float": outputs(float_artifact(tmp_path / "out", tmp_path / "float"), tokens, decoder),
    }
    for kind, bound in (("float", FLOAT), ("int8", INT8)):
        fake = FakeQuantized(captured, context.solutions, context.schemes, kind == "float")
        with torch.no_grad():
            expected = _pytree.tree_leaves(fake.run(*feeds))[0].numpy()
        if decoder:
            expected = expected[0, -3:]
        assert relative(found[kind], expected) <= bound, kind
