"""The passes: what rewrites a graph. Each is one file, one frozen dataclass, and knows graphs and not architectures."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.pipeline.passes import Pass
    from qcompiler.recipe.schema import Recipe

# What a recipe may name under `passes`, and where it is.
_WHERE = {
    "awq": "transform.awq:Awq",
    "bias_correction": "solve.bias_correction:BiasCorrection",
    "calibrate_ranges": "observe.calibrate_ranges:CalibrateRanges",
    "clip_search": "solve.clip_search:ClipSearch",
    "distill_blocks": "solve.distill_blocks:DistillBlocks",
    "distill_end_to_end": "solve.distill_end_to_end:DistillEndToEnd",
    "gptq": "solve.gptq:Gptq",
    "guide": "observe.guide:Guide",
    "gptvq": "solve.gptvq:Gptvq",
    "llm_int8": "observe.find_outliers:FindOutliers",
    "place_observers": "observe.place_observers:PlaceObservers",
    "round_to_nearest": "solve.round_to_nearest:RoundToNearest",
    "smooth_quant": "transform.smooth_quant:SmoothQuant",
}


class _RecipePasses(Mapping[str, "type[Pass]"]):
    """Pass classes by name. A pass is imported when it is asked for: passes use the sweep, and the sweep uses analyses."""

    def __getitem__(self, name: str) -> type[Pass]:
        module, _, cls = _WHERE[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)


RECIPE_PASSES: Mapping[str, type[Pass]] = _RecipePasses()


def __getattr__(name: str) -> Any:
    """The classes themselves, for recipes written in Python: `from qcompiler.passes import RoundToNearest`."""
    if name == "Pass":
        from qcompiler.pipeline.passes import Pass

        return Pass
    for key, where in _WHERE.items():
        if where.endswith(f":{name}"):
            return RECIPE_PASSES[key]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pipeline(recipe: Recipe, fuse: bool = True) -> tuple[list[Pass], list[Pass]]:
    """Every pass of a compile, in order: those that leave the graph in float, and those that rewrite it.

    `fuse`: whether the target has ops for what the fusions make; a recipe may leave them out as well.
    """
    from qcompiler.passes.analyse.assign_formats import AssignFormats
    from qcompiler.passes.analyse.find_groups import FindGroups
    from qcompiler.passes.analyse.find_roles import FindRoles
    from qcompiler.passes.analyse.find_sites import FindSites
    from qcompiler.passes.normalise.evaluate_weights import EvaluateWeights
    from qcompiler.passes.normalise.normalise_embedding import NormaliseEmbedding
    from qcompiler.passes.normalise.normalise_experts import NormaliseExperts
    from qcompiler.passes.normalise.normalise_linear import NormaliseLinear
    from qcompiler.passes.normalise.strip_guards import StripGuards
    from qcompiler.passes.normalise.widen_bfloat16 import WidenBfloat16
    from qcompiler.passes.rewrite.fuse_edges import FuseEdges
    from qcompiler.passes.rewrite.fuse_linears import FuseLinears
    from qcompiler.passes.rewrite.quantize_sites import QuantizeSites

    normalise = [
        StripGuards(), EvaluateWeights(), NormaliseLinear(), NormaliseExperts(), NormaliseEmbedding(), WidenBfloat16()
    ]  # fmt: skip
    analyse = [FindSites(), FindGroups(), FindRoles(), AssignFormats()]
    fusions = [FuseLinears(), FuseEdges()] if fuse and recipe.fuse else []
    return [*normalise, *analyse, *recipe.passes], [QuantizeSites(), *fusions]


__all__ = ["RECIPE_PASSES", "pipeline"]
