"""The passes: what rewrites a graph. Each is one file, one frozen dataclass, and knows graphs and not architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompiler.passes.observe.calibrate_ranges import CalibrateRanges
from qcompiler.passes.observe.find_outliers import FindOutliers
from qcompiler.passes.observe.place_observers import PlaceObservers
from qcompiler.passes.solve.bias_correction import BiasCorrection
from qcompiler.passes.solve.clip_search import ClipSearch
from qcompiler.passes.solve.distill_blocks import DistillBlocks
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.pipeline.passes import Pass

if TYPE_CHECKING:
    from qcompiler.recipe.schema import Recipe

# What a recipe may name under `passes`.
RECIPE_PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (BiasCorrection, CalibrateRanges, ClipSearch, FindOutliers, Gptq, PlaceObservers, RoundToNearest)
}


def pipeline(recipe: Recipe) -> tuple[list[Pass], list[Pass]]:
    """Every pass of a compile, in order: those that leave the graph in float, and those that rewrite it."""
    from qcompiler.passes.analyse.assign_formats import AssignFormats
    from qcompiler.passes.analyse.find_groups import FindGroups
    from qcompiler.passes.analyse.find_roles import FindRoles
    from qcompiler.passes.analyse.find_sites import FindSites
    from qcompiler.passes.normalise.normalise_embedding import NormaliseEmbedding
    from qcompiler.passes.normalise.normalise_experts import NormaliseExperts
    from qcompiler.passes.normalise.normalise_linear import NormaliseLinear
    from qcompiler.passes.normalise.strip_guards import StripGuards
    from qcompiler.passes.normalise.widen_bfloat16 import WidenBfloat16
    from qcompiler.passes.rewrite.quantize_sites import QuantizeSites

    normalise = [StripGuards(), NormaliseLinear(), NormaliseExperts(), NormaliseEmbedding(), WidenBfloat16()]
    analyse = [FindSites(), FindGroups(), FindRoles(), AssignFormats()]
    return [*normalise, *analyse, *recipe.passes], [QuantizeSites()]


__all__ = ["RECIPE_PASSES", "Pass", "RoundToNearest", "pipeline"]
