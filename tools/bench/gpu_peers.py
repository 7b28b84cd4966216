"""What our GPU kernels stand beside: torch.matmul, torch's int4 kernel, bitsandbytes, GemLite. What is missing is skipped."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tools.bench.gpu_side import CHECKED, GpuCase, GpuSide, Opened, Skipped, several
from tools.bench.peer_choice import chosen_sides


def codes_and_scales(case: GpuCase, group: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[n, k]` and scales float32 `[n, groups]` that bfloat16 holds; W = (code - 2^(bits-1)) · scale."""
    if case.k % group:
        raise Skipped(f"takes inputs that are a multiple of {group}, found {case.k}")
    generator = case.generator()
    codes = torch.randint(0, 2**bits, (case.n, case.k), dtype=torch.uint8, device=case.device, generator=generator)
    scales = torch.rand(case.n, case.k // group, device=case.device, generator=generator) * 0.01 + 0.005
    return codes, scales.bfloat16().float()


def dequantized(codes: torch.Tensor, scales: torch.Tensor, group: int, bits: int = 4) -> torch.Tensor:
    """The first rows of W, float32."""
    some = codes[:CHECKED].float() - 2 ** (bits - 1)
    return some * scales[:CHECKED].repeat_interleave(group, 1)


@dataclass(frozen=True)
class Float:
    """torch.matmul with a float16 or bfloat16 weight."""

    dtype: torch.dtype
    family: str = "float"

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        size = 2 * case.n * case.k
        first = torch.randn(case.n, case.k, device=case.device, generator=case.generator()).to(self.dtype)
        weights = several((first,), matrices(size))
        x = case.x(self.dtype)
        calls = [partial(torch.matmul, x, w.t()) for (w,) in weights]
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED], x.float() @ first[:CHECKED].float().t()))


@dataclass(frozen=True)
class TorchInt4:
    """torch.ops.aten._weight_int4pack_mm: bfloat16 activations, 4 bits with a scale and a zero a group."""

    group: int
    family: str = "torch"

    @property
    def name(self) -> str:
        return f"torch-int4-g{self.group}"

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        if case.device.type != "cuda":
            raise Skipped("torch's int4 kernel with weights in this order runs on a GPU only")
        codes, scales = codes_and_scales(case, self.group)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        step = scales.bfloat16().t()
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        first = (packed, self.group, torch.stack([step, torch.zeros_like(step)], dim=2).contiguous())
        size = case.n * case.k // 2 + 4 * scales.numel()
        x = case.x(torch.bfloat16)
        calls = [partial(torch.ops.aten._weight_int4pack_mm, x, *w) for w in several(first, matrices(size))]
        some = dequantized(codes, scales, self.group)
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED], x.float() @ some.t()))


@dataclass(frozen=True)
class TorchIntMm:
    """torch._int_mm: int8 by int8. Quantization of the activations and all scales are left out."""

    name: str = "torch-int-mm"
    family: str = "torch"

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        if case.rows <= 16:
            raise Skipped("torch._int_mm takes more than 16 rows")
        x = case.x(torch.float32)
        step = x.abs().amax(1, keepdim=True) / 127
        a = (x / step).round().to(torch.int8)
        weight = torch.randint(-127, 128, (case.n, case.k), dtype=torch.int8, device=case.device, generator=case.generator())
        size = weight.numel()
        calls = [partial(torch._int_mm, a, w.t()) for (w,) in several((weight,), matrices(size))]
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED].float() * step, x @ weight[:CHECKED].float().t()))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skipped(f"not installed: {name.split('.')[0]}") from None


@dataclass(frozen=True)
class BitsAndBytes:
    """bitsandbytes.matmul_4bit: NF4 with a scale for 64 weights, float16 activations."""

    name: str = "bitsandbytes-nf4"
    family: str = "bitsandbytes"

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        library, functional = _module("bitsandbytes"), _module("bitsandbytes.functional")
        weight = torch.randn(case.n, case.k, device=case.device, generator=case.generator()).half() * 0.02
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        size = packed.numel() * packed.element_size() + 4 * state.absmax.numel()
        x = case.x(torch.float16)
        product = partial(library.matmul_4bit, x, quant_state=state)
        calls = [partial(product, w.t()) for (w,) in several((packed,), matrices(size))]
        some = functional.dequantize_4bit(packed, state)[:CHECKED].float()
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED], x.float() @ some.t()))


@dataclass(frozen=True)
class GemLite:
    """GemLite's Triton kernels, 4 bits, float16 activations, with its own choice of configuration."""

    group: int = 128
    family: str = "gemlite"

    @property
    def name(self) -> str:
        return f"gemlite-int4-g{self.group}"

    def open(self, case: GpuCase, matrices: Callable[[int], int]) -> Opened:
        core = _module("gemlite.core")
        codes, scales = codes_and_scales(case, self.group)
        size = case.n * case.k // 2 + 4 * scales.numel()
        x = case.x(torch.float16)

        def layer() -> Any:
            made = core.GemLiteLinear(
                4, group_size=self.group, in_features=case.k, out_features=case.n, input_dtype=core.DType.FP16,
                output_dtype=core.DType.FP16,
            )  # fmt: skip
            made.pack(codes, scales.half(), torch.full_like(scales, 8).half(), None)
            return made

        layers = [layer() for _ in range(matrices(size))]
        calls = [partial(one, x) for one in layers]
        some = dequantized(codes, scales, self.group)
        return Opened(calls, size, lambda: (calls[0]()[:, :CHECKED], x.float() @ some.t()))


FLOATS = (Float(torch.float16), Float(torch.bfloat16))
FAMILIES: dict[str, tuple[GpuSide, ...]] = {
    "torch": (TorchInt4(32), TorchInt4(128), TorchIntMm()),
    "bitsandbytes": (BitsAndBytes(),),
    "gemlite": (GemLite(),),
}


def sides(chosen: str) -> list[GpuSide]:
    """float16 and bfloat16, which ratios are against, and the sides of `chosen`: none, all, names of programs or of sides."""
    return list(({side.name: side for side in FLOATS} | chosen_sides(FAMILIES, chosen)).values())
