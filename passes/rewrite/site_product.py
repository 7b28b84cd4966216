"""What a solved site becomes: the op, its packed tensors and its attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcompiler.errors import GateError, InputError, UnsupportedError
from qcompiler.numerics.affine import AffineWeight
from qcompiler.numerics.stack import matrices
from qcompiler.numerics.vq import VqWeight
from qcompiler.ops import layout, vq_layout
from qcompiler.ops.activation_range import INPUTS, range_inputs
from qcompiler.ops.formats import LAYOUT_VERSION, Activation
from qcompiler.ops.linear_mixed import check_columns, outlier_bytes
from qcompiler.ops.spec import SPECS
from qcompiler.ops.torch_ops import overload

if TYPE_CHECKING:
    from qcompiler.graph.graph import Site
    from qcompiler.pipeline.context import Context
    from qcompiler.recipe.schema import AnyScheme
    from qcompiler.sweep.solutions import Solution

# What sites of one storage share; everything else is a site's own.
WEIGHT = ("codes", "scales", "zeros", "codebooks", "codebook_scales")


def pack(solution: Solution) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight in the layout of the kernels (docs/layout.md), by input name; of many experts one after
    another."""
    if isinstance(solution, VqWeight):
        return _pack_vq(solution)
    if solution.codes.dim() == 3:
        packs = [pack(matrix) for matrix in matrices(solution)]
        return {name: torch.cat([tensors[name] for tensors in packs]) for name in packs[0]}
    bits = solution.format.bits
    packed = {
        "codes": layout.pack_codes(solution.codes.numpy(), bits),
        "scales": layout.pack_scales(solution.scales.numpy()),
    }
    if solution.zeros is not None:
        packed["zeros"] = layout.pack_zeros(solution.zeros.numpy(), bits)
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def _pack_vq(solution: VqWeight) -> dict[str, torch.Tensor]:
    packed = vq_layout.pack(
        solution.indices.numpy(), solution.codebooks.numpy(), solution.codebook_scales.numpy(), solution.scales.numpy(),
        solution.columns, solution.format,
    )  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def own_tensors(
    site: Site, solution: Solution, scheme: AnyScheme, context: Context, weight: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What a linear site's op reads beside the packed weight and the bias: a static range, outlier columns.

    Args:
        site, solution, scheme: the site, its quantized weight, its formats.
        context: with `static_ranges` and `outliers`.
        weight: the float weight `[n, k]`; needed where the site has outlier columns.

    Raises:
        GateError: static activations without a calibrated range.
        UnsupportedError: static activations of experts, outlier columns beside codebooks.
        InputError: a range or columns that the op does not take.
    """
    tensors: dict[str, torch.Tensor] = {}
    if site.kind == "experts" and scheme.activation is Activation.INT8_STATIC:
        raise UnsupportedError(
            f"layer {site.name}: experts take no int8-static activations; nearest: int8-block128 or int8-token"
        )
    if site.kind != "linear":
        return tensors
    try:
        columns = context.outliers.get(site.name)
        if columns is not None:
            if weight is None:
                raise TypeError(f"site {site.name} has outlier columns: its float weight is needed")
            if isinstance(solution, VqWeight):
                raise UnsupportedError(
                    f"layer {site.name}: outlier columns beside {solution.format.label} have no op; give the layer an integer "
                    "format, or leave llm_int8 out"
                )
            check_columns(columns.numpy(), site.shape[1])
            floats = weight.detach()[:, columns].float().numpy()
            tensors["columns"] = columns.to(torch.int32)
            tensors["outliers"] = torch.from_numpy(layout.pack_outliers(floats))
        if scheme.activation is Activation.INT8_STATIC:
            if site.name not in context.static_ranges:
                raise GateError(
                    f"layer {site.name}: no calibrated range for its int8-static activations; "
                    "add place_observers and calibrate_ranges to the recipe's passes"
                )
            assert isinstance(solution, AffineWeight)  # no other scheme has static activations
            zeros = None if solution.zeros is None else solution.zeros.numpy()
            codes, scales = solution.codes.numpy(), solution.scales.numpy()
            range_ = range_inputs(*context.static_ranges[site.name], codes, scales, zeros, solution.format)
            tensors |= {name: torch.from_numpy(array) for name, array in range_.items() if array is not None}
    except ValueError as error:
        raise InputError(f"layer {site.name}: {error}") from error
    return tensors


def own_bytes(site: Site, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of `own_tensors` by kind: `outliers`, `activations`, and `padding` of the outliers' last tile."""
    sizes = outlier_bytes(site.shape[0], len(tensors["columns"])) if "columns" in tensors else {}
    activations = sum(tensors[name].nbytes for name in INPUTS if name in tensors)
    return sizes | ({"activations": activations} if activations else {})


def op_name(site: Site, solution: Solution, tensors: dict[str, torch.Tensor]) -> str:
    """The op that a site becomes; `tensors`: its own."""
    if isinstance(solution, VqWeight):
        return "embedding_vq" if site.kind == "embedding" else "linear_vq"
    if site.kind == "embedding":
        return "embedding_nbit"
    if site.kind == "experts":
        return "linear_experts_nbit"
    return "linear_mixed" if "columns" in tensors else "linear_nbit"


def attributes(site: Site, solution: Solution, scheme: AnyScheme) -> dict[str, int]:
    """The op's attributes by name."""
    n, k = site.shape
    if isinstance(solution, VqWeight):
        shape = {name: getattr(solution.format, name) for name in ("dim", "centroids", "block_rows", "block_columns", "group")}
        return shape | {"n": n, "k": k, "activation": int(scheme.activation), "layout_version": LAYOUT_VERSION}
    sizes = {"bits": solution.format.bits, "group": solution.format.group, "n": n, "k": k}
    sizes |= {"experts": site.experts} if site.kind == "experts" else {}
    return sizes | {"activation": int(scheme.activation), "layout_version": LAYOUT_VERSION}


@dataclass(frozen=True)
class SiteProduct:
    """A site's quantized product, packed once: `product(x, bias)`, of experts `product(x, bias, expert)`.

    Attributes:
        name: of the torch op.
        tensors: by input name, without x, bias and expert.
        attributes: by name.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    attributes: dict[str, int]

    @classmethod
    def of(
        cls,
        site: Site,
        solution: Solution,
        scheme: AnyScheme,
        context: Context,
        weight: torch.Tensor | None = None,
        packed: dict[str, torch.Tensor] | None = None,
    ) -> SiteProduct:
        """Arguments and errors as of `own_tensors`; `packed`: what `pack` made of the solution, where it was made already."""
        own = own_tensors(site, solution, scheme, context, weight)
        weights = pack(solution) if packed is None else packed
        return cls(op_name(site, solution, own), weights | own, attributes(site, solution, scheme))

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x `[..., k]` float32, bias `[n]` or None -> `[..., n]`; with experts x `[rows, k]`, bias `[experts, n]`, expert
        `[rows]`."""
        spec, given = SPECS[self.name], {"x": x, "bias": bias, "expert": expert, **self.tensors}
        inputs = [given.get(i.name) for i in spec.inputs]
        return overload(self.name)(*inputs, *spec.values(self.attributes))


def quantized_product(
    site: Site,
    solution: Solution,
    scheme: AnyScheme,
    context: Context,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of a linear site as its op will compute it. Packs anew on every call: for many x keep a `SiteProduct`.

    Arguments and errors as of `own_tensors`; x `[..., k]` float32, bias `[n]` or None.
    """
    return SiteProduct.of(site, solution, scheme, context, weight)(x, bias)
