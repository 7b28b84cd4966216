"""Our GPU kernels as sides: every format with float activations or int8 ones, through the op and its dispatch table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from qcompiler.errors import UnsupportedError
from qcompiler.ops import SPECS, layout, vq_layout
from qcompiler.ops.formats import LAYOUT_VERSION, Activation, AffineFormat, VqFormat, WeightFormat
from tools.bench.gpu_side import CHECKED, GpuCase, Opened, Skipped, several
from tools.bench.kernels_ours import FORMATS

ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class Choice:
    """A kernel and its configuration, as the dispatch table has them."""

    kernel: str
    config: Mapping[str, int] = field(hash=False)

    @property
    def text(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.config.items())])


def activation_of(name: str, format: WeightFormat) -> Activation:
    """`float`, or what int8 activations are with this format: one scale a row where a whole row has one, else one per 128."""
    if name == "float":
        return Activation.FLOAT
    whole_rows = isinstance(format, AffineFormat) and format.bits == 8 and not format.group
    return Activation.INT8_TOKEN if whole_rows else Activation.INT8_BLOCK


def packed(case: GpuCase, format: WeightFormat) -> dict[str, torch.Tensor]:
    """Random tensors of a packed weight by the names of the op's inputs; every byte is valid in every format."""
    n, k, generator = case.n, case.k, case.generator()

    def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=case.device, generator=generator)

    def scales(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.rand(shape, device=case.device, generator=generator) * 0.01 + 0.005).half()

    if isinstance(format, AffineFormat):
        codes = integers(layout.codes_shape(n, k, format.bits), 0, 256, torch.uint8)
        return {"codes": codes, "scales": scales(layout.scales_shape(n, k, format))}
    return {
        "codes": integers(vq_layout.codes_shape(n, k, format), 0, 256, torch.uint8),
        "codebooks": integers(vq_layout.codebooks_shape(n, k, format), -128, 128, torch.int8),
        "codebook_scales": scales(format.blocks(n, k)),
        "scales": scales(vq_layout.scales_shape(n, k, format)),
    }


def dequantized(case: GpuCase, format: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The first rows of W as float32: whole tiles are whole at the beginning of every tensor."""
    n, k = min(CHECKED, case.n), case.k
    tiles = -(-n // 16)
    array = {name: tensor.cpu().numpy() for name, tensor in tensors.items() if name != "codes"}
    scales, codes = layout.unpack_scales(array["scales"][:tiles], n), tensors["codes"][:tiles].cpu().numpy()
    if isinstance(format, AffineFormat):
        return layout.dequantize(layout.unpack_codes(codes, n, k, format.bits), scales, None, format)
    indices = vq_layout.unpack_indices(codes, n, k, format)
    down = format.blocks(n, k)[0]
    books = vq_layout.unpack_codebooks(array["codebooks"][:down])
    return vq_layout.dequantize(indices, books, array["codebook_scales"][:down], scales, k, format)


@dataclass(frozen=True)
class Ours:
    """One format with one kind and type of activations; `choice` None: what the dispatch table names."""

    format_name: str
    activations: str = "float"
    dtype: torch.dtype = torch.float16
    choice: Choice | None = None
    family: str = "ours"

    @property
    def name(self) -> str:
        parts = [self.format_name, *(["int8"] if self.activations != "float" else [])]
        return " ".join([*parts, *(["bf16"] if self.dtype == torch.bfloat16 else [])])

    @property
    def format(self) -> WeightFormat:
        return FORMATS[self.format_name]

    @property
    def op(self) -> str:
        return "linear_vq" if isinstance(self.format, VqFormat) else "linear_nbit"

    def attributes(self, case: GpuCase) -> dict[str, Any]:
        """Of the op; what is left out has its default."""
        format = self.format
        vq = ("dim", "centroids", "block_rows", "block_columns", "group")
        names = vq if isinstance(format, VqFormat) else ("bits", "group")
        given = {name: getattr(format, name) for name in names}
        activation = int(activation_of(self.activations, format))
        return {**given, "n": case.n, "k": case.k, "activation": activation, "layout_version": LAYOUT_VERSION}

    def chosen(self, case: GpuCase) -> Choice:
        """What a call takes."""
        if self.choice is not None:
            return self.choice
        from qcompiler.gpu import device, dispatch

        found = dispatch.choose(
            self.op, format=self.format.label, activation=activation_of(self.activations, self.format).label,
            dtype=str(self.dtype).removeprefix("torch."), rows=case.rows, outputs=case.n, inputs=case.k,
            device=device.name(case.device),
        )  # fmt: skip
        return Choice(found.kernel, dict(found.config))

    def opened(self, case: GpuCase) -> tuple[dict[str, torch.Tensor], Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]:
        """A weight and the product of the case's activations with it, once done: its kernels are compiled.

        Raises:
            Skipped: a candidate that the op does not have.
        """
        from qcompiler.gpu import dispatch
        from qcompiler.ops.torch_ops import overload

        spec, tensors = SPECS[self.op], packed(case, self.format)
        values = spec.values(self.attributes(case))
        x, op, choice = case.x(self.dtype), overload(self.op), self.chosen(case)

        def product(weight: Mapping[str, torch.Tensor]) -> torch.Tensor:
            inputs = (x if i.name == "x" else weight.get(i.name) for i in spec.inputs)
            with dispatch.forced(choice.kernel, **choice.config):
                return op(*inputs, *values)

        try:
            product(tensors)
        except UnsupportedError as error:
            raise Skipped(str(error)) from error
        return tensors, product

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        tensors, product = self.opened(case)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weights = [dict(zip(tensors, parts, strict=True)) for parts in several(tuple(tensors.values()), matrices(size))]
        some = torch.from_numpy(dequantized(case, self.format, tensors)).to(case.device)
        calls, choice = [partial(product, weight) for weight in weights], self.chosen(case)
        about = {"kernel": choice.kernel, "config": dict(choice.config)}
        expected = lambda: case.x(self.dtype).float() @ some.t()  # noqa: E731
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED], expected()), about)
