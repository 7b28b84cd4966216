"""Every declared op, every case: reference, each instruction set, ONNX Runtime with and without the library, torch.

With int8 activations everything but the reference gives the same bits; so does the embedding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.ops import SPECS
from qcompiler.ops.formats import Activation
from qcompiler.ops.onnx_ops import register, single_node_model
from qcompiler.ops.torch_ops import overload
from qcompiler.runtime import library, library_vq

register()
# float32 sums in another order than the reference's float64
TOLERANCE = 2e-5
CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases()]
GROUPS: dict[tuple[str, str], list] = {}
for spec, case in CASES:
    GROUPS.setdefault((spec.name, case.label.split(" ")[0]), []).append((spec, case))


def close(found: np.ndarray, expected: np.ndarray, label: str) -> None:
    assert found.shape == expected.shape, label
    assert found.dtype == expected.dtype, label
    if expected.size:
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=label)


def torch_inputs(spec, case) -> list[torch.Tensor | None]:
    arrays = [case.inputs.get(i.name) for i in spec.inputs]
    return [None if array is None else torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def run_torch(spec, case) -> np.ndarray:
    tensors = torch_inputs(spec, case)
    return overload(spec.name)(*tensors, *spec.values(case.attributes)).numpy()


def run_ctypes(spec, case, isa: str) -> np.ndarray:
    arguments = {name: value for name, value in case.inputs.items() if value is not None}
    attributes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    first = np.ascontiguousarray(arguments.pop(spec.inputs[0].name))
    call = getattr(library_vq if spec.name in ("linear_vq", "embedding_vq") else library, spec.name)
    return call(first, **arguments, **attributes, isa=isa)


def run_onnx(spec, case, with_library: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if with_library:
        options.register_custom_ops_library(str(library.library_path()))
    model = ir.serde.serialize_model(single_node_model(spec, case)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    first = spec.inputs[0].name
    return session.run(None, {first: case.inputs[first]})[0]


@pytest.mark.parametrize("name,format", GROUPS, ids=lambda part: str(part))
def test_parity(name, format):
    for spec, case in GROUPS[name, format]:
        expected = spec.reference(case.inputs, case.attributes)
        native = run_torch(spec, case)
        close(native, expected, f"torch: {case.label}")
        for isa in library.isas():
            found = run_ctypes(spec, case, isa)
            assert np.array_equal(found, native), f"{isa} differs from {library.isa()}: {case.label}"
        assert np.array_equal(run_onnx(spec, case, with_library=True), native), f"ONNX Runtime: {case.label}"
        body = run_onnx(spec, case, with_library=False)
        # float activations (no case of an embedding has any) are summed in another order
        if case.attributes.get("activation") != Activation.FLOAT:
            assert np.array_equal(body, native), f"function body: {case.label}"
        close(body, expected, f"function body: {case.label}")


def test_fake_implementations_give_the_real_shapes():
    for spec, case in CASES[::17]:
        tensors = torch_inputs(spec, case)
        attributes = spec.values(case.attributes)
        real = overload(spec.name)(*tensors, *attributes)
        fake = overload(spec.name)(*(None if t is None else t.to("meta") for t in tensors), *attributes)
        assert fake.shape == real.shape and fake.dtype == real.dtype


@pytest.mark.parametrize("name", ["embedding_nbit", "embedding_vq"])
def test_negative_indices_count_from_the_end(name):
    spec = SPECS[name]
    case = next(iter(spec.cases()))
    from dataclasses import replace

    turned = replace(case, inputs={**case.inputs, "indices": case.inputs["indices"] - case.attributes["n"]})
    expected = spec.reference(case.inputs, case.attributes)
    for found in (run_torch(spec, turned), run_onnx(spec, turned, True), run_onnx(spec, turned, False)):
        np.testing.assert_array_equal(found, expected)


def test_a_runtime_that_mixes_up_variants_refuses_the_model():
    """ONNX Runtime before 1.27 ignores `overload` and runs another variant's body; the marker makes it fail at load."""
    spec = SPECS["linear_nbit"]
    cases = [next(c for _, c in GROUPS[spec.name, label]) for label in ("int4-g32-sym", "int2-g32-sym")]
    model, other = (single_node_model(spec, case) for case in cases)
    (node,) = model.graph
    (function,) = other.functions.values()
    model.functions.clear()
    model.functions[function.identifier()] = function
    node.overload = function.overload
    content = ir.serde.serialize_model(model).SerializeToString()
    with pytest.raises(Exception, match="(?i)constant"):
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
