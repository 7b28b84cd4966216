"""A compile's state up to calibration, for a tiny captured model: sites with formats, and samples of tokens."""

from __future__ import annotations

from typing import Any

import torch

from qcompiler import recipe as recipes
from qcompiler.capture.feeds import feed
from qcompiler.passes.analyse.assign_formats import AssignFormats
from qcompiler.pipeline.context import Context
from qcompiler.report.progress import Silent
from tests.captures import Analysed

INT4 = {"bits": 4, "group": 64, "activations": "float"}


def context_of(model: Analysed, linear: dict[str, Any] = INT4, samples: int = 3, length: int = 12, **more: Any) -> Context:
    """A context whose samples are random tokens, the same for the same numbers."""
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(3, 500, (1, length), generator=generator) for _ in range(samples)]
    feeds = [feed(model.prepared, ids) for ids in tokens]
    allow = {"min_coverage": 0}
    recipe = recipes.parse({"name": "test", "linear": linear, "allow": allow, **more}, "test")
    context = Context(recipe, Silent(), samples=lambda: feeds)
    AssignFormats().run(model.graph, context)
    return context


def linear_sites(model: Analysed) -> list[Any]:
    """Every linear site but the head."""
    return [site for site in model.graph.sites if site.kind == "linear" and site.role != "head"]
