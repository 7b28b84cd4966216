"""The weight of a site as a solver gets to see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context
    from qcompiler.recipe.schema import VqScheme


def quantizable_weight(graph: Graph, context: Context, site: Site) -> torch.Tensor:
    """The site's weight where the context computes, float32 `[n, k]`, with zeros in the columns that stay in float beside it.

    Outlier columns are no part of the quantized product: zeroed, they widen no scale. The result may be the stored weight
    itself: do not write into it.
    """
    weight = graph.constant(site.weight).to(context.device)
    columns = context.outliers.get(site.name)
    if columns is None or not len(columns):
        return weight
    return weight.index_fill(1, columns.to(context.device), 0.0)


def quantizable_matrices(graph: Graph, context: Context, site: Site) -> Iterator[tuple[int, torch.Tensor]]:
    """As `Graph.matrices`, where the context computes."""
    for expert, weight in graph.matrices(site):
        yield expert, weight.to(context.device)


def fixed_table(scheme: VqScheme) -> torch.Tensor | None:
    """The entries that the format does not learn, float32 `[centroids, 1]`, or None."""
    from qcompiler.numerics.vq_tables import TABLES

    levels = TABLES[scheme.fixed] if isinstance(scheme.fixed, str) else scheme.fixed
    return None if levels is None else torch.tensor(levels, dtype=torch.float32)[:, None]
