"""Captured models, each made once a test run: `analysed("llama")`. Tests read them and leave them as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.exporters.utils import get_leaf_tensors

from qcompiler.capture.capture import captured
from qcompiler.capture.feeds import cache_name, feed
from qcompiler.capture.prepare import prepare
from qcompiler.capture.prepared import Prepared
from qcompiler.graph.graph import Graph
from qcompiler.graph.text import graph_text
from qcompiler.graph.verify import verify
from qcompiler.passes.analyse.find_groups import FindGroups
from qcompiler.passes.analyse.find_roles import FindRoles
from qcompiler.passes.analyse.find_sites import FindSites
from qcompiler.passes.normalise.normalise_embedding import NormaliseEmbedding
from qcompiler.passes.normalise.normalise_experts import NormaliseExperts
from qcompiler.passes.normalise.normalise_linear import NormaliseLinear
from qcompiler.passes.normalise.strip_guards import StripGuards
from qcompiler.passes.normalise.widen_bfloat16 import WidenBfloat16
from qcompiler.pipeline.passes import Report
from tests.models import tiny

NORMALISE = (StripGuards(), NormaliseLinear(), NormaliseExperts(), NormaliseEmbedding(), WidenBfloat16())
ANALYSE = (FindSites(), FindGroups(), FindRoles())


@dataclass
class Analysed:
    """A model, its graph after normalising and analysing, what each pass reported, and the text at each stage."""

    model: torch.nn.Module
    prepared: Prepared
    graph: Graph
    reports: dict[str, Report]
    texts: dict[str, str]


@functools.cache
def analysed(model_type: str) -> Analysed:
    model = tiny(model_type)
    prepared = prepare(model)
    graph = captured(prepared)
    texts = {"captured": graph_text(graph.module)}
    verify(graph, "captured")
    reports = run(graph, NORMALISE)
    texts["normalised"] = graph_text(graph.module)
    verify(graph, "normalised")
    reports |= run(graph, ANALYSE)
    verify(graph, "analysed")
    return Analysed(model, prepared, graph, reports, texts)


def run(graph: Graph, passes: tuple) -> dict[str, Report]:
    """Run passes in order, each seeing a sound graph."""
    reports = {}
    for step in passes:
        reports[step.name] = step.run(graph, None)
        graph.module.graph.lint()
    return reports


class Stepper:
    """Feeds a captured decoder step by step, its cache included, starting from no past at all."""

    def __init__(self, module: Callable[..., Any], prepared: Prepared) -> None:
        self.module, self.prepared = module, prepared
        self.past, self.cache = 0, None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = self.module(**feed(self.prepared, tokens, self.past, self.cache))
        self.past += tokens.shape[1]
        self.cache = getattr(output, cache_name(self.prepared))
        return output.logits


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference between nested outputs, relative to the largest number in each."""
    errors = []
    wanted = get_leaf_tensors(expected)
    for path, tensor in get_leaf_tensors(found).items():
        errors.append(((tensor - wanted[path]).abs().max() / wanted[path].abs().max()).item())
    return max(errors)
