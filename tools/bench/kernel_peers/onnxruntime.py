"""ONNX Runtime: MatMulNBits with int8 activations (accuracy level 4), and DynamicQuantizeMatMul. A graph chains the matrices."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.kernel_peers import weights
from tools.bench.kernels_side import Case, Opened, Skipped

Initializers = list[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class OnnxRuntime:
    """`block` 0: DynamicQuantizeMatMul, int8 with a scale a column; otherwise MatMulNBits of `bits` in blocks of `block`."""

    bits: int
    block: int
    family: str = "onnxruntime"

    @property
    def name(self) -> str:
        return f"ort-int{self.bits}-b{self.block}" if self.block else "ort-dynamic-int8"

    def open(self, case: Case) -> Opened:
        weights.need_square(case)
        weights.need_multiple(case, self.block or 1)
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise Skipped(f"not installed: {error.name}") from None
        matrix_bytes = sum(array.nbytes for _, array in self._matrix(case, 0))
        matrices = case.count(matrix_bytes)
        run, x = self._session(case, matrices), case.x()

        def product() -> tuple[np.ndarray, np.ndarray]:
            if not np.isfinite(run(x)).all():
                return run(x), np.ones_like(x)
            some = self._dequantized(case)
            return self._session(case, 1)(x)[:, : len(some)], x @ some.T

        return Opened(lambda: run(x), matrices, matrix_bytes, product)

    def _session(self, case: Case, matrices: int) -> Callable[[np.ndarray], np.ndarray]:
        """Computes the product with that many matrices in turn."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory(prefix="qcompiler-kernels-") as folder:
            self._write(case, matrices, Path(folder))
            session = ort.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]

    def _write(self, case: Case, matrices: int, folder: Path) -> None:
        from onnx import TensorProto, helper, save

        nodes, tensors, last = [], [], "x"
        with (folder / "data").open("wb") as data:
            for index in range(matrices):
                parts = self._matrix(case, index)
                for name, array in parts:
                    tensor = TensorProto(name=f"{name}{index}", dims=array.shape)
                    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
                    tensor.data_location = TensorProto.EXTERNAL
                    data.write(b"\0" * (-data.tell() % 65536))
                    for key, value in (("location", "data"), ("offset", data.tell()), ("length", array.nbytes)):
                        tensor.external_data.add(key=key, value=str(value))
                    data.write(array.tobytes())
                    tensors.append(tensor)
                out = f"y{index}" if index + 1 < matrices else "y"
                inputs = [last, *(f"{name}{index}" for name, _ in parts)]
                nodes.append(self._node(helper, case, inputs, out))
                last = out
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.rows, case.n]) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")

    def _node(self, helper: Any, case: Case, inputs: list[str], out: str) -> Any:
        if not self.block:
            return helper.make_node("DynamicQuantizeMatMul", inputs, [out], domain="com.microsoft")
        sizes = {"K": case.k, "N": case.n, "bits": self.bits, "block_size": self.block}
        return helper.make_node("MatMulNBits", inputs, [out], domain="com.microsoft", accuracy_level=4, **sizes)

    def _matrix(self, case: Case, index: int) -> Initializers:
        """Tensors of a matrix, in the order of the op's inputs."""
        n, k, rng = case.n, case.k, weights.generator(index)
        if not self.block:
            codes = weights.codes(rng, k, n, 8).view(np.int8)
            return [("codes", codes), ("scales", weights.scales(rng, (n,), k, 8))]
        codes = weights.codes(rng, n, k, self.bits).reshape(n, k // self.block, -1)
        return [("codes", codes), ("scales", weights.scales(rng, (n, k // self.block), k, self.bits))]

    def _dequantized(self, case: Case) -> np.ndarray:
        """The first rows of the first matrix, float32."""
        (_, codes), (_, scales) = self._matrix(case, 0)
        some = weights.checked_rows(case.n)
        if not self.block:
            return codes[:, :some].T.astype(np.float32) * scales[:some, None]
        values = weights.unpacked(codes[:some].reshape(some, -1), self.bits).astype(np.float32) - 2 ** (self.bits - 1)
        return values * weights.spread(scales[:some], self.block)


SIDES = (*(OnnxRuntime(bits, block) for bits in (2, 4, 8) for block in (32, 128)), OnnxRuntime(8, 0))
