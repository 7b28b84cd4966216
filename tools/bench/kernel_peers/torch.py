"""torch: weights of 4 and of 8 bits with bfloat16 activations, and the product of two int8 matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.bench.kernel_peers import weights
from tools.bench.kernels_side import Case, Opened, Skipped

INT4, INT8, INT_MM = "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm", "_int_mm"


@dataclass(frozen=True)
class Torch:
    """An operator of torch.ops.aten. `_int_mm` is given int8 activations: their quantization and all scales are left out."""

    operator: str
    group: int = 0
    family: str = "torch"

    @property
    def name(self) -> str:
        return {INT4: f"torch-int4-g{self.group}", INT8: "torch-int8", INT_MM: "torch-int-mm"}[self.operator]

    def open(self, case: Case) -> Opened:
        try:
            import torch
        except ImportError:
            raise Skipped("not installed: torch") from None
        if not hasattr(torch.ops.aten, self.operator):
            raise Skipped(f"torch {torch.__version__} has no {self.operator}")
        weights.need_multiple(case, self.group or 1)
        torch.set_num_threads(case.threads)
        function = getattr(torch.ops.aten, self.operator).default
        n, k = case.n, case.k
        matrix_bytes = n * k // 2 + 4 * n * (k // self.group) if self.group else n * k + 2 * n * (self.operator == INT8)
        x = case.x()
        a, step = self._activations(x)
        # The same weights in memory of their own: packing each would take far longer than measuring.
        first = self._matrix(case)
        copies = range(1, case.count(matrix_bytes))
        matrices = [first, *(tuple(a if isinstance(a, int) else a.clone() for a in first) for _ in copies)]
        try:
            function(a, *matrices[0])
        except RuntimeError as error:
            raise Skipped(str(error).splitlines()[0]) from None

        def walk() -> None:
            for matrix in matrices:
                function(a, *matrix)

        def product() -> tuple[np.ndarray, np.ndarray]:
            some = self._dequantized(case)
            return function(a, *matrices[0]).float().numpy()[:, : len(some)] * step, x @ some.T

        return Opened(walk, len(matrices), matrix_bytes, product, matrices.clear)

    def _activations(self, x: np.ndarray) -> tuple:
        """x as the operator takes it, and what its result is multiplied by."""
        import torch

        if self.operator != INT_MM:
            return torch.from_numpy(x).bfloat16(), np.float32(1)
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        return torch.from_numpy(np.rint(x / step).astype(np.int8)), step

    def _numbers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Codes `[n, k]` (0 … 15, or int8) and float32 scales `[n, groups]` that bfloat16 holds."""
        import torch

        rng, bits = weights.generator(0), 4 if self.group else 8
        packed = weights.codes(rng, case.n, case.k, bits)
        scales = weights.scales(rng, (case.n, case.k // self.group if self.group else 1), case.k, bits)
        scales = torch.from_numpy(scales).bfloat16().float().numpy()
        return (weights.unpacked(packed, 4) if self.group else packed.view(np.int8)), scales

    def _matrix(self, case: Case) -> tuple:
        """The operator's arguments after the activations."""
        import torch

        codes, scales = self._numbers(case)
        if self.operator == INT_MM:
            return (torch.from_numpy(codes.copy()).t(),)
        step = torch.from_numpy(scales).bfloat16()
        if self.operator == INT8:
            return torch.from_numpy(codes.copy()), step[:, 0].contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes.astype(np.int32)), 1)
        # W = (code - 8) * scale + zero; [groups, n, (scale, zero)]
        return packed, self.group, torch.stack([step.t(), torch.zeros_like(step.t())], dim=2).contiguous()

    def _dequantized(self, case: Case) -> np.ndarray:
        some = weights.checked_rows(case.n)
        codes, scales = self._numbers(case)
        if self.operator == INT_MM:
            return codes[:some].astype(np.float32)
        if self.operator == INT8:
            return codes[:some].astype(np.float32) * scales[:some]
        return (codes[:some].astype(np.float32) - 8) * weights.spread(scales[:some], self.group)


SIDES = (Torch(INT4, 32), Torch(INT4, 128), Torch(INT8), Torch(INT_MM))
