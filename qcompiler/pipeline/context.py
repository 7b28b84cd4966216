"""What passes share while a model is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.sweep.solutions import Solution, Solutions

if TYPE_CHECKING:
    import torch

    from qcompiler.recipe.schema import AnyScheme, Recipe
    from qcompiler.report.progress import Reporter
    from qcompiler.sweep.store import SolvedStore


@dataclass
class Context:
    """State of one compile.

    Attributes:
        recipe: as resolved.
        reporter: progress and notes for the user.
        schemes: site name -> format that it gets.
        left_in_float: site name -> why it stays in float.
        solutions: site name -> quantized weight, filled by the solve passes.
        samples: yields keyword arguments of the graph, one calibration sample each; empty when there are none.
        packed: solutions packed already, by identity: (solution, its tensors as the kernels read them).
        static_ranges: site name -> (scale, zero point) of its input, for sites with static int8 activations.
        outliers: site name -> sorted columns of its input that stay in float beside the quantized product.
        guides: site name -> how much the end loss cares about each calibration token and group of the site's outputs:
            float32 `[tokens of all samples in their order, groups]`, of mean 1 a group.
        memory: bytes of anonymous memory that calibration may take, or None for no bound.
        scratch: a folder for what does not fit: solutions, packed weights, activations between segments; None keeps them
            in memory.
        store: solved sites by the content that they were solved from, for resuming; None when nothing is kept.
        device: where samples run and solvers compute. Weights, samples, solutions and what lives between segments stay in memory
            of the CPU, and go there as they are needed.
    """

    recipe: Recipe
    reporter: Reporter
    schemes: dict[str, AnyScheme] = field(default_factory=dict)
    left_in_float: dict[str, str] = field(default_factory=dict)
    solutions: Solutions = field(default_factory=Solutions)
    samples: Callable[[], Iterable[dict[str, Any]]] = tuple
    packed: dict[int, tuple[Solution, dict[str, torch.Tensor]]] = field(default_factory=dict)
    static_ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    outliers: dict[str, torch.Tensor] = field(default_factory=dict)
    guides: dict[str, torch.Tensor] = field(default_factory=dict)
    memory: int | None = None
    scratch: Path | None = None
    store: SolvedStore | None = None
    device: str = "cpu"
