"""The passes: what rewrites a graph. Each is one file, one frozen dataclass, and knows graphs and not architectures."""

from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.passes import Pass

# What a recipe may name under `passes`.
RECIPE_PASSES: dict[str, type[Pass]] = {cls.name: cls for cls in (RoundToNearest,)}

__all__ = ["RECIPE_PASSES", "Pass", "RoundToNearest"]
