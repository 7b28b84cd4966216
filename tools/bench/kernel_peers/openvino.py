"""OpenVINO's CPU plugin: compressed constants, int8 activations quantized in groups. A graph chains the matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.bench.kernel_peers import weights
from tools.bench.kernels_side import Case, Opened, Skipped


@dataclass(frozen=True)
class OpenVino:
    """Constant -> Convert -> Subtract (unsigned codes) -> Multiply (-> Reshape) -> MatMul, `group` 0: a scale a row."""

    bits: int
    group: int
    signed: bool = False
    family: str = "openvino"

    @property
    def name(self) -> str:
        return f"openvino-{'i' if self.signed else 'u'}{self.bits}-{f'g{self.group}' if self.group else 'row'}"

    def open(self, case: Case) -> Opened:
        try:
            import openvino  # noqa: F401
        except ImportError:
            raise Skipped("not installed: openvino") from None
        weights.need_square(case)
        weights.need_multiple(case, self.group or 1)
        n, groups = case.n, case.k // self.group if self.group else 1
        # Float16 scales, one zero point a matrix.
        matrix_bytes = n * case.k * self.bits // 8 + 2 * n * groups + (not self.signed)
        matrices = case.count(matrix_bytes)
        run, x = self._compiled(case, matrices), case.x()

        def product() -> tuple[np.ndarray, np.ndarray]:
            if not np.isfinite(run(x)).all():
                return run(x), np.ones_like(x)
            some, single = self._dequantized(case), self._compiled(case, 1)
            return single(x)[:, : len(some)].copy(), x @ some.T  # a copy: the result lies in memory of `single`

        return Opened(lambda: run(x), matrices, matrix_bytes, product)

    def _compiled(self, case: Case, matrices: int) -> Callable[[np.ndarray], np.ndarray]:
        """Computes the product with that many matrices in turn."""
        import openvino as ov
        from openvino import opset13 as ops

        x = ops.parameter([case.rows, case.k], np.float32)
        last: Any = x
        for index in range(matrices):
            last = ops.matmul(last, self._weight(ov, ops, case, index), False, True)
        # The activations' group is the weights' own; rows of 8-bit weights take the plugin's choice.
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        if self.group:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = self.group
        request = ov.Core().compile_model(ov.Model([last], [x]), "CPU", settings).create_infer_request()

        def run(values: np.ndarray) -> np.ndarray:
            request.infer([values], share_inputs=True, share_outputs=True)
            return request.get_output_tensor().data

        return run

    def _weight(self, ov: Any, ops: Any, case: Case, index: int) -> Any:
        """W[n, k] in float32 as the plugin recognises compressed weights."""
        codes, scales = self._numbers(case, index)
        n, k, group = case.n, case.k, self.group or case.k
        shape = [n, k // group, group] if self.group else [n, k]
        kind = getattr(ov.Type, f"{'i' if self.signed else 'u'}{self.bits}")

        def constant(packed: np.ndarray, sides: list[int]) -> Any:
            copied = ops.constant(ov.Tensor(packed, ov.Shape(sides), kind), shared_memory=False)
            return ops.convert(copied, np.float16)

        value = constant(codes.copy(), shape)
        if not self.signed:
            value = ops.subtract(value, constant(np.array([2 ** (self.bits - 1)], np.uint8), [1] * len(shape)))
        value = ops.multiply(value, ops.constant(scales[:, :, None] if self.group else scales))
        if self.group:
            value = ops.reshape(value, np.array([n, k], np.int64), False)
        return ops.convert(value, np.float32)

    def _numbers(self, case: Case, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes and float16 scales `[n, groups]`."""
        rng = weights.generator(index)
        groups = case.k // self.group if self.group else 1
        codes = weights.codes(rng, case.n, case.k, self.bits)
        return codes, weights.scales(rng, (case.n, groups), case.k, self.bits).astype(np.float16)

    def _dequantized(self, case: Case) -> np.ndarray:
        some = weights.checked_rows(case.n)
        codes, scales = self._numbers(case, 0)
        values = weights.unpacked(codes[:some], self.bits).astype(np.float32)
        half = 2 ** (self.bits - 1)
        values = np.where(values < half, values, values - 2 * half) if self.signed else values - half
        return values * weights.spread(scales[:some].astype(np.float32), self.group or case.k)


SIDES = (
    *(OpenVino(4, group, signed) for signed in (False, True) for group in (32, 128)),
    OpenVino(8, 0),
    OpenVino(8, 0, signed=True),
)
