"""The graph that passes work on: one captured FX graph and what analysis found in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["decoder", "encoder", "module"]


@dataclass
class Site:
    """A product with a constant weight (`linear`) or a row lookup in one (`embedding`): a place to quantize.

    Attributes:
        name: module path of the weight's owner, e.g. `model.layers.0.self_attn.q_proj`; unique in the graph.
        kind: `linear` for `aten.linear(x, W, b)` with W `[n, k]`; `embedding` for `aten.embedding(W, ids)`.
        node: the call in the FX graph.
        weight: name of the weight attribute on the GraphModule (dotted), or None where it is not one constant.
        bias: likewise, or None.
        shape: `(n, k)`, outputs by inputs (rows by width for an embedding).
        role: `attn.q`, `attn.k`, `attn.v`, `attn.qkv`, `attn.o`, `mlp.gate`, `mlp.up`, `mlp.gate_up`, `mlp.down`,
            `embed`, `head`, `router`, `expert`; None where the structure does not say.
        input_group: sites that read the same value share this number.
        tie_group: sites whose weights share one storage share this number; None when the weight is used once.
    """

    name: str
    kind: Literal["linear", "embedding"]
    node: torch.fx.Node
    weight: str
    bias: str | None
    shape: tuple[int, int]
    role: str | None = None
    input_group: int = -1
    tie_group: int | None = None


@dataclass
class Graph:
    """A captured model.

    Attributes:
        module: the FX GraphModule; ATen ops, never decomposed, parameters and buffers as `get_attr` nodes.
        kind: `decoder` (tokens and a cache in, logits and a cache out), `encoder`, or plain `module`.
        example: keyword arguments that the module was captured with.
        sites: filled by the `sites` analysis; empty before it.
        leftovers: products with a constant that no analysis could bring into the form of a site:
            name -> (bytes, why). They stay in float and count against coverage.
    """

    module: torch.fx.GraphModule
    kind: Kind
    example: dict
    sites: list[Site] = field(default_factory=list)
    leftovers: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.module.graph.nodes)

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def constant(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that dotted name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf)
