"""Which sites a solve pass takes, and why it leaves the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompiler.ops.formats import AffineFormat
from qcompiler.pipeline.passes import Skip
from qcompiler.pipeline.selection import check_selector
from qcompiler.recipe.schema import VqScheme

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.recipe.schema import Select


def unsolved(
    step: str, graph: Graph, context: Context, select: Select, head: bool = False, codebooks: bool = False
) -> tuple[list[Site], list[Skip]]:
    """Linear sites with a format, without a solution, that `select` names; the rest with its reasons.

    Either those of integer formats or, with `codebooks`, the vector-quantized ones.

    The head is left out unless `head` says otherwise or the selection names it: it is most of a small model's statistics
    and the least sensitive to what they are for.
    """
    check_selector(step, select, graph, context)
    chosen: list[Site] = []
    skipped: list[Skip] = []
    for site in graph.sites:
        if site.kind == "embedding":
            continue
        reason = None
        if site.name not in context.schemes:
            reason = context.left_in_float.get(site.name, "no format")
        elif site.name in context.solutions:
            reason = "solved already"
        elif isinstance(context.schemes[site.name], VqScheme) is not codebooks:
            reason = f"{context.schemes[site.name].weight_format.label}: {'not ' * codebooks}vector-quantized"
        elif not select.matches(site.name, site.role, site.shape[0] * site.shape[1]):
            reason = "not selected"
        elif site.role == "head" and not head and select.role is None and select.name is None:
            reason = "the head; name it to have it solved"
        if reason is None:
            chosen.append(site)
        else:
            skipped.append(Skip(site.name, reason))
    return chosen, skipped


def integer_format(context: Context, site: Site) -> AffineFormat:
    """The format of a site that `unsolved` gave, or that has such a solution."""
    format = context.schemes[site.name].weight_format
    assert isinstance(format, AffineFormat), f"{site.name} is {format.label}"
    return format
