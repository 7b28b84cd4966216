"""What passes share while a model is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.numerics.affine import AffineWeight
    from qcompiler.recipe.schema import Recipe, Scheme
    from qcompiler.report.progress import Reporter


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
    """

    recipe: Recipe
    reporter: Reporter
    schemes: dict[str, Scheme] = field(default_factory=dict)
    left_in_float: dict[str, str] = field(default_factory=dict)
    solutions: dict[str, AffineWeight] = field(default_factory=dict)
    samples: Callable[[], Iterable[dict[str, Any]]] = tuple
