"""The quantized product of a solved site, as the artifact will compute it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from qcompiler.graph.graph import Graph, Site
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops.formats import Activation
from qcompiler.passes.rewrite.quantize_sites import packed
from qcompiler.passes.rewrite.site_product import SiteProduct
from qcompiler.sweep.place import CPU, moved

if TYPE_CHECKING:
    from qcompiler.pipeline.context import Context
    from qcompiler.sweep.execute import Product


def product(graph: Graph, site: Site, context: Context) -> Product:
    """What to call instead of the site's op, with the op's arguments (the weight is None).

    Static activations whose range is not calibrated yet stay in float.
    """
    solution, scheme = context.solutions[site.name], context.schemes[site.name]
    if isinstance(solution, VqWeight):
        if site.kind == "embedding":
            rows = solution
            return lambda weight, ids, *_: rows.dequantize(ids.cpu().flatten()).reshape(*ids.shape, -1).to(ids.device)
    elif site.kind == "embedding":
        width = solution.format.group or site.shape[1]

        def lookup(weight: None, ids: torch.Tensor, *_: object) -> torch.Tensor:
            place, ids = ids.device, ids.cpu()  # the table stays where it is, its rows are few
            codes = solution.codes[ids].float()
            spread = lambda t: t[ids].float().repeat_interleave(width, dim=-1)[..., : site.shape[1]]  # noqa: E731
            centre = solution.format.center if solution.zeros is None else spread(solution.zeros)
            return ((codes - centre) * spread(solution.scales)).to(place)

        return lookup
    if scheme.activation is Activation.INT8_STATIC and site.name not in context.static_ranges:
        scheme = dataclasses.replace(scheme, activations="float")  # affine: no other takes static ranges
    weight = graph.constant(site.weight) if site.name in context.outliers else None
    made = SiteProduct.of(site, solution, scheme, context, weight, packed(site.name, context))
    if context.device != CPU:
        made = dataclasses.replace(made, tensors=moved(made.tensors, context.device))
    if site.kind == "experts":
        return lambda x, expert, weight=None, bias=None: made(x, bias, expert)
    return lambda x, weight=None, bias=None: made(x, bias)
