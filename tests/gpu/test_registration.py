"""The ops as torch sees them: one schema, kernels for CPU and GPU, shapes and dtypes that are known without running."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompiler.ops import SPECS
from qcompiler.ops.torch_ops import overload
from tests.gpu.parity import CUDA, DEVICE, rounded, tensors


def a_case(name: str):
    return next(c for c in SPECS[name].cases() if all(v is None or v.size for v in c.inputs.values()))


@pytest.mark.parametrize("name", SPECS)
def test_kernels_for_cpu_and_gpu_are_registered(name: str) -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qcompiler::{name}", key)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_has_the_dtype_of_x_and_an_embedding_float32(name: str, dtype: torch.dtype) -> None:
    spec, case = SPECS[name], a_case(name)
    arrays = [case.inputs.get(i.name) for i in spec.inputs]
    given = [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    with FakeTensorMode() as mode:
        fake = [None if t is None else mode.from_tensor(t) for t in given]
        if spec.inputs[0].name == "x":
            fake[0] = fake[0].to(dtype)
        y = overload(name)(*fake, *spec.values(case.attributes))
    assert y.dtype == (dtype if spec.inputs[0].name == "x" else torch.float32)
    assert y.shape == spec.reference(case.inputs, case.attributes).shape


@pytest.mark.parametrize("name", SPECS)
def test_opcheck(name: str) -> None:
    """Schema, fake and ahead-of-time tracing agree with the kernel: the GPU's where there is one, else the CPU's."""
    spec, case = SPECS[name], a_case(name)
    dtype = torch.float16 if CUDA else torch.float32
    assert DEVICE.type == ("cuda" if CUDA else "cpu")
    found = torch.library.opcheck(overload(name), (*tensors(spec, rounded(case, dtype), dtype), *spec.values(case.attributes)))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_graph_gives_what_the_op_gives(name: str) -> None:
    spec, case = SPECS[name], rounded(a_case(name), torch.float16)
    first, *rest = tensors(spec, case, torch.float16)
    values = spec.values(case.attributes)
    run = lambda x: overload(name)(x, *rest, *values)  # noqa: E731
    assert torch.equal(torch.compile(run, mode="max-autotune", fullgraph=True)(first), run(first))
