"""Which sites a solve pass takes, and why it leaves the others."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from qcompiler.errors import UsageError
from qcompiler.pipeline.passes import Skip

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.recipe.schema import Select


def unsolved(
    step: str, graph: Graph, context: Context, select: Select, head: bool = False
) -> tuple[list[Site], list[Skip]]:
    """Linear sites with a format, without a solution, that `select` names; the rest with its reasons.

    The head is left out unless `head` says otherwise or the selection names it: it is most of a small model's statistics
    and the least sensitive to what they are for.
    """
    check_selector(step, select, graph)
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
        elif not select.matches(site.name, site.role, site.shape[0] * site.shape[1]):
            reason = "not selected"
        elif site.role == "head" and not head and select.role is None and select.name is None:
            reason = "the head; name it to have it solved"
        if reason is None:
            chosen.append(site)
        else:
            skipped.append(Skip(site.name, reason))
    return chosen, skipped


def check_selector(step: str, select: Select, graph: Graph) -> None:
    """Refuse a selector that names no site of the graph.

    Raises:
        UsageError: lists the nearest names and the roles that there are.
    """
    if any(select.matches(s.name, s.role, s.shape[0] * s.shape[1]) for s in graph.sites):
        return
    wanted = select.name or select.role or ""
    names = [site.name for site in graph.sites]
    roles = sorted({site.role for site in graph.sites if site.role})
    near = difflib.get_close_matches(wanted.replace("*", ""), names + roles, n=4, cutoff=0.0)
    raise UsageError(
        f"{step}: its selection {select} names no layer; nearest: {', '.join(near) or 'none'}; "
        f"roles here: {', '.join(roles) or 'none'}"
    )
