"""Give every site the format that the recipe asks for, or say why it stays in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.graph.edit import args
from qcompiler.ops.formats import Activation
from qcompiler.ops.packing import packed_bytes_of
from qcompiler.pipeline.passes import Pass, Report, Skip
from qcompiler.recipe.schema import VqScheme

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context

LARGEST_K = 65536  # longer rows could overflow the int32 sums of an int8 kernel


@dataclass(frozen=True)
class AssignFormats(Pass):
    """site  ─▶  site : int4-g32-sym/int8-block128   (a decision; the graph does not change)"""

    name: ClassVar[str] = "assign_formats"
    stage: ClassVar[str] = "analyse"
    required: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Report:
        report = Report(matched=len(graph.sites))
        for site in graph.sites:
            k = site.shape[1]
            scheme = context.recipe.scheme(site.name, site.kind, site.role, site.size)
            if scheme == "float":
                context.left_in_float[site.name] = "the recipe keeps it in float"
            elif k > LARGEST_K:
                context.left_in_float[site.name] = f"rows of {k} weights; the kernels sum at most {LARGEST_K}"
            elif (computed := _computed_in(site)) is not torch.float32:
                context.left_in_float[site.name] = f"it computes in {computed}; the kernels take torch.float32"
            else:
                if isinstance(scheme, VqScheme) and (reason := _no_codebooks(site, scheme)):
                    reason += f"; {scheme.fallback.weight_format.label} in place of {scheme.weight_format.label}"
                    report.fallbacks.append(Skip(site.name, reason))
                    scheme = scheme.fallback
                group = scheme.weight_format.group
                if context.recipe.strict_groups and group and k % group:
                    raise UsageError(
                        f"layer {site.name}: rows of {k} do not divide into groups of {group}, "
                        "and the recipe says strict_groups"
                    )
                if site.kind == "experts" and scheme.activation is Activation.INT8_STATIC:
                    raise UnsupportedError(
                        f"layer {site.name}: experts take no int8-static activations; nearest: int8-block128 or int8-token, "
                        "in an override that selects the role expert"
                    )
                context.schemes[site.name] = scheme
                report.layers[site.name] = {"format": scheme.weight_format.label, "activation": scheme.activations}
                report.changed += 1
                continue
            report.skipped.append(Skip(site.name, context.left_in_float[site.name]))
        _check_ties(graph.sites, context)
        _check_overrides(graph.sites, context, report)
        return report


def _computed_in(site: Site) -> torch.dtype:
    """Type of the values that meet the weight, or of the rows that are looked up.

    Raises:
        UnsupportedError: the weight has another type: the model's code asks for one that its weights do not have any more.
    """
    first, second = args(site.node)[0], args(site.node)[2 if site.kind == "experts" else 1]
    weight = (first if site.kind == "embedding" else second).meta["val"].dtype
    computed = weight if site.kind == "embedding" else first.meta["val"].dtype
    if computed is not weight:
        raise UnsupportedError(
            f"layer {site.name}: the model's own code gives it {computed} values for {weight} weights; expected code that "
            "follows the type of its weights, which are compiled as float32"
        )
    return computed


def _no_codebooks(site: Site, scheme: VqScheme) -> str | None:
    """Why a site cannot be vector-quantized, or None."""
    if site.kind == "experts":
        return "there is no op for experts with codebooks"
    (n, k), format = site.shape, scheme.weight_format
    vectors = min(n, format.block_rows or n) * -(-min(k, format.block_columns or k) // format.dim)
    if scheme.fixed is None and vectors < format.centroids:
        return f"{vectors} vectors of {format.dim} weights in a block are too few for a codebook of {format.centroids}"
    # As stored, padding of tiles included on both sides.
    bits = 8 * (sum(packed_bytes_of(n, k, format).values())) / (n * k)
    other = 8 * (sum(packed_bytes_of(n, k, scheme.fallback.weight_format).values())) / (n * k)
    return f"{n} x {k} weights would take {bits:.2f} bits each with codebooks, {other:.2f} without" if bits > other else None


def _check_ties(sites: list[Site], context: Context) -> None:
    """Sites of one storage must agree: they share one packed tensor."""
    groups: dict[int, Site] = {}
    for site in sites:
        if site.tie_group is None:
            continue
        first = groups.setdefault(site.tie_group, site)
        formats = [
            context.schemes[s.name].weight_format.label if s.name in context.schemes else "float" for s in (first, site)
        ]
        if formats[0] != formats[1]:
            raise UsageError(
                f"{first.name} and {site.name} are one tied tensor, but the recipe asks for {formats[0]} and {formats[1]}; "
                "give both the same weight format"
            )


def _check_overrides(sites: list[Site], context: Context, report: Report) -> None:
    """An override that selects nothing is reported: it is a typo more often than a wish."""
    for index, override in enumerate(context.recipe.overrides):
        if not any(override.select.matches(s.name, s.role, s.size) for s in sites):
            name = f"overrides.{index}"
            if name not in context.recipe.allow.unmatched:
                known = sorted({s.role for s in sites if s.role})
                raise UsageError(
                    f"recipe {context.recipe.name}: {name} selects no layer ({override.select}); "
                    f"roles here: {', '.join(known) or 'none'}; names look like {sites[0].name!r}. "
                    f"Allow it with allow: {{unmatched: [{name}]}}"
                )
            report.skipped.append(Skip(name, "selects no layer; allowed by the recipe"))
