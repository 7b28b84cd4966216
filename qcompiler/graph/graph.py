"""The graph that passes work on: one captured FX graph and what analysis found in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qcompiler.graph.constants import attribute, set_parameter, storage_key
from qcompiler.graph.mapped import kept

Kind = Literal["decoder", "encoder", "encoder-decoder", "module"]
SiteKind = Literal["linear", "embedding", "experts"]

_LARGE = 2**20  # bytes from which a constant is worth a file


@dataclass
class Site:
    """A product with a constant weight (`linear`), with many of which each row meets one (`experts`), or a row lookup in one
    (`embedding`): a place to quantize.

    A solver treats an `experts` site as that many linear ones: `Graph.matrices` yields (expert, `[n, k]`), the node's first
    two arguments are the rows `[rows, k]` and the expert of each, int64 `[rows]`, which
    `qcompiler.ops.experts_linear.rows_by_expert` sorts out; the solution's tensors are stacked, `[experts, n, k]`.

    Attributes:
        name: module path of the weight's owner, e.g. `model.layers.0.self_attn.q_proj`; unique in the graph.
        kind: `linear` for `aten.linear(x, W, b)` with W `[n, k]`; `embedding` for `aten.embedding(W, ids)`; `experts` for
            `experts_linear(x, expert, W, b)` with W `[experts, n, k]`.
        node: the call in the FX graph; after `fuse_linears` that which computes several sites.
        weight: name of the weight attribute on the GraphModule (dotted), or None where it is not one constant.
        bias: likewise, or None.
        shape: `(n, k)`, outputs by inputs (rows by width for an embedding).
        role: `attn.q`, `attn.k`, `attn.v`, `attn.qkv`, `attn.o`, `mlp.gate`, `mlp.up`, `mlp.gate_up`, `mlp.down`,
            `embed`, `head`, `router`, `expert`; None where the structure does not say.
        input_group: sites that read the same value share this number.
        tie_group: sites whose weights share one storage share this number; None when the weight is used once.
        experts: matrices of that shape; 1 for every other kind.
    """

    name: str
    kind: SiteKind
    node: torch.fx.Node
    weight: str
    bias: str | None
    shape: tuple[int, int]
    role: str | None = None
    input_group: int = -1
    tie_group: int | None = None
    experts: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight itself."""
        return (self.experts, *self.shape) if self.kind == "experts" else self.shape

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.experts * self.shape[0] * self.shape[1]


@dataclass
class Scaling:
    """diag(rows) · W · diag(columns), applied when the weight is read; None is a vector of ones."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            weight = weight * self.rows.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
        return weight if self.columns is None else weight * self.columns.to(weight.dtype)


@dataclass
class Graph:
    """A captured model.

    The module's floating constants may be stored in another type than the graph computes in (a mapped bfloat16 checkpoint
    under a float32 graph), and a rewrite may have scaled them: read them through `constant`, never as attributes.

    Attributes:
        module: the FX GraphModule; ATen ops, never decomposed, parameters and buffers as `get_attr` nodes.
        kind: `decoder` (tokens and a cache in, logits and a cache out), `encoder`, or plain `module`.
        example: keyword arguments that the module was captured with.
        sites: filled by the `sites` analysis; empty before it.
        leftovers: products with a constant that no analysis could bring into the form of a site:
            name -> (bytes, why). They stay in float and count against coverage.
        scalings: pending row and column factors of constants, by name; see `scale_rows`.
    """

    module: torch.fx.GraphModule
    kind: Kind
    example: dict
    sites: list[Site] = field(default_factory=list)
    leftovers: dict[str, tuple[int, str]] = field(default_factory=dict)
    scalings: dict[str, Scaling] = field(default_factory=dict)

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.module.graph.nodes)

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def constant(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that dotted name as the graph computes with it.

        Half-precision storage is widened to float32 and pending scalings are applied, on every call anew: what is mapped
        from a file stays there. Without either it is the stored tensor itself; do not write into it.
        """
        tensor = attribute(self.module, name).detach()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        scaling = self.scalings.get(name)
        return tensor if scaling is None else scaling.apply(tensor)

    def matrices(self, site: Site) -> Iterator[tuple[int, torch.Tensor]]:
        """(expert, weight `[n, k]`) of each matrix of a site, as `constant` shows it, read one at a time; expert 0 is the
        only one where the kind is not `experts`."""
        if site.kind != "experts":
            yield 0, self.constant(site.weight)
            return
        stored, scaling = self.stored(site.weight).detach(), self.scalings.get(site.weight)
        for expert in range(site.experts):
            weight = stored[expert]
            weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
            if scaling is not None:
                rows = None if scaling.rows is None else scaling.rows[expert].expand(site.shape[0])
                weight = Scaling(rows, scaling.columns).apply(weight)
            yield expert, weight

    def stored(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that dotted name as it is stored."""
        return attribute(self.module, name)

    def scale_rows(self, name: str, factors: torch.Tensor) -> None:
        """Multiply axis 0 of a constant by `factors` `[n]`; recorded, and applied whenever it is read."""
        held = self.scalings.setdefault(name, Scaling())
        held.rows = factors if held.rows is None else held.rows * factors

    def scale_columns(self, name: str, factors: torch.Tensor) -> None:
        """Multiply the last axis of a constant by `factors` `[k]`; recorded, and applied whenever it is read."""
        held = self.scalings.setdefault(name, Scaling())
        held.columns = factors if held.columns is None else held.columns * factors

    def set_constant(self, name: str, value: torch.Tensor) -> None:
        """Replace a constant by `value` (or create it); pending scalings of the old one are dropped."""
        self.scalings.pop(name, None)
        set_parameter(self.module, name, value)

    def materialise(self, folder: Path | None = None) -> int:
        """Store every constant that the graph still reads as `constant` shows it; returns how many were changed.

        Large ones go to files in `folder`, where there is one. Constants that share a storage still do.
        """
        changed = 0
        made: dict[object, torch.nn.Parameter] = {}
        for node in self.module.graph.nodes:
            if node.op != "get_attr":
                continue
            name, computed = str(node.target), node.meta.get("val")
            stored = self.stored(name)
            dtype = computed.dtype if isinstance(computed, torch.Tensor) else stored.dtype
            if name in self.scalings or stored.dtype != dtype:
                key = name if name in self.scalings else storage_key(stored)
                if key not in made:
                    value = self.constant(name).to(dtype)
                    value = value if value.nbytes < _LARGE else kept({"float": value}, folder, name)["float"]
                    made[key] = torch.nn.Parameter(value, requires_grad=False)
                set_parameter(self.module, name, made[key])
                self.scalings.pop(name, None)
                changed += 1
        self.scalings.clear()
        return changed
