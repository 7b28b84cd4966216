"""A pass's selection that names no layer is a typo more often than a wish: it is refused before the pass runs."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from qcompiler.errors import UsageError

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph
    from qcompiler.pipeline.context import Context
    from qcompiler.recipe.schema import Select


def check_selector(step: str, select: Select, graph: Graph, context: Context) -> None:
    """Refuse a selector that names no site of the graph, unless the recipe allows the pass to match nothing.

    Raises:
        UsageError: lists the nearest names and the roles that there are.
    """
    if step in context.recipe.allow.unmatched or not graph.sites:
        return
    if any(select.matches(site.name, site.role, site.size) for site in graph.sites):
        return
    wanted = select.name or select.role or ""
    names = [site.name for site in graph.sites]
    roles = sorted({site.role for site in graph.sites if site.role})
    near = difflib.get_close_matches(wanted.replace("*", ""), names + roles, n=4, cutoff=0.0)
    raise UsageError(
        f"{step}: its selection ({select}) names no layer; nearest: {', '.join(near)}; "
        f"roles here: {', '.join(roles) or 'none'}. Allow it with the recipe's allow: {{unmatched: [{step}]}}"
    )
