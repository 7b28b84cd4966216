"""Which linear ops can be one op: they read one value, in one format, and each part ends where a tile does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompiler.graph.constants import attribute
from qcompiler.graph.edit import args
from qcompiler.graph.graph import Graph, Site
from qcompiler.ops.formats import TILE, Activation
from qcompiler.ops.packing import format_of
from qcompiler.ops.spec import SPECS
from qcompiler.ops.torch_ops import overload
from qcompiler.passes.rewrite.op_nodes import arguments
from qcompiler.pipeline.passes import Skip

# Inputs that have a part for every row (axis 0 counts tiles, blocks or rows), and those that stand for all rows.
BY_ROW = ("codes", "scales", "zeros", "codebooks", "codebook_scales", "bias", "activation_offset")
SHARED = ("activation_scale", "activation_zero")
_CODEBOOK = ("codebooks", "codebook_scales")
_OPS: dict[Any, str] = {overload(name): name for name in ("linear_nbit", "linear_vq")}
_UNFUSED: dict[Any, str] = {overload("linear_mixed"): "it has outlier columns of its own"}


@dataclass(frozen=True)
class Product:
    """A linear op of one site.

    Attributes:
        site: whose `node` it is.
        op: name of the op.
        constants: input name -> name of the constant, all but x.
        attributes: by name.
        one_codebook: what all rows share, where a codebook is for all of them: its bytes.
        activation_range: bytes of a static range.
    """

    site: Site
    op: str
    constants: dict[str, str]
    attributes: dict[str, int]
    one_codebook: bytes = b""
    activation_range: bytes = b""

    @property
    def node(self) -> Node:
        return self.site.node

    @property
    def rows(self) -> int:
        return self.attributes["n"]

    @property
    def shared(self) -> tuple[str, ...]:
        """Inputs that stand for all rows."""
        return SHARED + (_CODEBOOK if self.one_codebook else ())

    @property
    def whole(self) -> bool:
        """Whether another product's rows may follow: the last tile and the last block of a codebook are full."""
        return self.rows % max(TILE, self.attributes.get("block_rows", 0)) == 0

    @property
    def label(self) -> str:
        """`int4-g32-sym/int8-block128, with bias`."""
        format = format_of(self.attributes, self.constants)
        bias = ", with bias" if "bias" in self.constants else ""
        return f"{format.label}/{Activation(self.attributes['activation']).label}{bias}"


def runs(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """Sites in the graph's order that read one value, two or more with no other site between them."""
    for (group, kind), run in itertools.groupby(sites, lambda site: (site.input_group, site.kind)):
        found = list(run)
        if group >= 0 and kind != "embedding" and len(found) > 1:
            yield found


def product_of(graph: Graph, site: Site, skipped: list[Skip]) -> Product | None:
    """The op that the site became; None with a word in `skipped` where it can be no part of another."""
    op = _OPS.get(site.node.target, "")
    given, attributes = _arguments(site.node, op) if op else ({}, {})
    reason = _unfit(site, given)
    if reason is not None:
        skipped.append(Skip(site.name, reason))
        return None
    constants = {name: str(value.target) for name, value in given.items()}
    held = lambda *names: b"".join(_bytes(graph, constants[name]) for name in names if name in constants)  # noqa: E731
    one_codebook = held(*_CODEBOOK) if attributes.get("block_rows") == 0 else b""
    return Product(site, op, constants, attributes, one_codebook, held(*SHARED))


def _arguments(node: Node, op: str) -> tuple[dict[str, Node], dict[str, int]]:
    """Inputs but x, those that are there, and attributes, by name."""
    values, spec = arguments(node), SPECS[op]
    inputs = {i.name: values[i.name] for i in spec.inputs if i.name != "x" and values[i.name] is not None}
    return inputs, {name: values[name] for name in spec.attributes}


def _unfit(site: Site, given: dict[str, Node]) -> str | None:
    if site.kind == "experts":
        return "experts have an op of their own"
    if site.tie_group is not None:
        return "it shares its weight with another layer"
    if site.node.target not in _OPS:
        return _UNFUSED.get(site.node.target, "it stays in float")
    for name, value in given.items():
        if name not in BY_ROW + SHARED:
            return f"its op reads {name}"
        if value.op != "get_attr":
            return f"its {name} is computed"
    return None


def _bytes(graph: Graph, name: str) -> bytes:
    return attribute(graph.module, name).numpy().tobytes()


def chunks(products: list[Product], skipped: list[Skip]) -> Iterator[list[Product]]:
    """Products that can be one, two or more at a time, in their order; what is left over has a word in `skipped`."""
    alike: dict[object, list[Product]] = {}
    for product in products:
        alike.setdefault(_key(product), []).append(product)
    for bucket in alike.values():
        chunk: list[Product] = []
        for product in bucket:
            chunk.append(product)
            if not product.whole or product is bucket[-1]:  # only the last may end within a tile
                if len(chunk) > 1:
                    yield chunk
                else:
                    skipped.append(Skip(product.site.name, _alone(product, bucket, products)))
                chunk = []


def _key(product: Product) -> object:
    attributes = tuple((name, value) for name, value in product.attributes.items() if name != "n")
    return (
        args(product.node)[0], product.op, attributes, frozenset(product.constants), product.one_codebook,
        product.activation_range,
    )  # fmt: skip


def _alone(product: Product, bucket: list[Product], products: list[Product]) -> str:
    """Why a product found no other to be one with."""
    if len(bucket) > 1:
        step = max(TILE, product.attributes.get("block_rows", 0))
        return f"{product.rows} rows beside {', '.join(str(p.rows) for p in bucket if p is not product)}: all but the last " \
            f"must be a multiple of {step}"
    others = [p for p in products if p is not product]
    if not others:
        return "no other layer that reads its input can be fused"
    labels = sorted({other.label for other in others} - {product.label})
    if labels:
        return f"{product.label} beside {' and '.join(labels)}"
    if any(args(other.node)[0] is not args(product.node)[0] for other in others):
        return "it reads its input in another shape than its neighbours"
    return "one codebook for all rows" if product.one_codebook else "its activations have a range of their own"
