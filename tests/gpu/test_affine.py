"""Packed affine weights on a GPU: to the bit where arithmetic allows, and what is refused. Parity: `tests/gpu/every_case.py`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import dispatch, implementation
from qcompiler.gpu.dequantize import INT_MM_ROWS
from qcompiler.gpu.dot import blocks_of_rows
from qcompiler.ops import SPECS, layout
from qcompiler.ops.formats import BITS, GROUPS, Activation, AffineFormat
from qcompiler.ops.linear_nbit import random_weight
from qcompiler.ops.spec import Case
from tests.gpu.every_case import CONFIGS, kernels, rows_of
from tests.gpu.parity import CUDA, DEVICE, DTYPES, check, check_repeats, run


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [Activation.INT8_TOKEN, Activation.INT8_STATIC])
def test_the_integer_product_of_the_library(symmetric: bool, kind: Activation) -> None:
    spec = SPECS["linear_nbit"]
    wanted = AffineFormat(8, 0, symmetric).label
    cases = [c for c in spec.cases() if c.label.split(" ")[0] == wanted and c.attributes["activation"] == kind]
    for case in [c for c in cases if rows_of(c) >= INT_MM_ROWS] or cases[:1]:
        if rows_of(case) < INT_MM_ROWS:
            x = np.tile(case.inputs["x"].reshape(-1, case.attributes["k"]), (INT_MM_ROWS, 1))
            case = replace(case, inputs={**case.inputs, "x": x, "residual": None})
        with dispatch.forced("int_mm", chunk=0):
            check(spec, case, torch.float16)


def unit_case(bits: int, group: int, symmetric: bool, n: int, k: int) -> Case:
    tensors, attributes = random_weight(np.random.default_rng(bits), n, k, AffineFormat(bits, group, symmetric))
    inputs = {"x": np.eye(k, dtype=np.float32), **tensors}
    return Case("identity", inputs, {**attributes, "activation": 0, "gate": 0, "epsilon": 0.0})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_identity_gives_the_weight_to_the_bit(bits: int, symmetric: bool, exhaustive: bool) -> None:
    """FLUTE's test: no order of sums, no scale in the wrong place can hide in a tolerance."""
    wide = {"block_m": 128, "block_n": 64, "block_k": 64, "split": 2, "warps": 4, "stages": 2}
    configs = {"gemv": {**CONFIGS["gemv"], "split": 1}, "dot": wide, "matmul": {"chunk": 0}}
    n, k = 37, 72
    for number, group in enumerate(GROUPS):
        case = unit_case(bits, group, symmetric, n, k)
        format = AffineFormat(bits, group, symmetric)
        zeros = case.inputs["zeros"]
        weight = layout.dequantize(
            layout.unpack_codes(case.inputs["codes"], n, k, bits), layout.unpack_scales(case.inputs["scales"], n),
            None if zeros is None else layout.unpack_zeros(zeros, n, bits), format,
        )  # fmt: skip
        able = list(configs)
        for kernel in able if exhaustive or CUDA else (able[(number + bits + symmetric) % 3],):
            columns = list(range(k)) if kernel != "gemv" or CUDA else [0, 21 + number, k - 1]
            part = replace(case, inputs={**case.inputs, "x": np.eye(k, dtype=np.float32)[columns]})
            for dtype in DTYPES if CUDA else DTYPES[number % 2 :][:1]:
                with dispatch.forced(kernel, **configs[kernel]):
                    y = run(SPECS["linear_nbit"], part, dtype)
                expected = torch.from_numpy(weight.T[columns].copy()).to(dtype)
                assert torch.equal(y.cpu(), expected), (kernel, format.label, dtype)


@pytest.mark.parametrize("kind", list(Activation))
def test_a_row_that_is_not_finite_is_nan_throughout_and_alone(kind: Activation) -> None:
    spec = SPECS["linear_nbit"]
    of_kind = [c for c in spec.cases() if c.attributes["activation"] == kind]
    candidates = [c for c in of_kind if rows_of(c) == 3 and not c.attributes.get("gate")]
    for kernel, bad, case in zip(("gemv", "dot", "matmul", "dot"), (np.inf, np.nan, -np.inf, -np.inf), candidates, strict=False):
        if kernel not in kernels("linear_nbit", case):
            continue
        x = case.inputs["x"].reshape(3, -1).copy()
        x[1, x.shape[1] // 2] = bad
        residual = None if case.inputs.get("residual") is None else case.inputs["residual"].reshape(3, -1)
        broken = replace(case, inputs={**case.inputs, "x": x, "residual": residual})
        with dispatch.forced(kernel, **CONFIGS[kernel]):
            y = run(spec, broken)
        assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all(), (kernel, case.label)


def test_a_row_that_is_not_finite_in_an_outlier_column_is_nan() -> None:
    spec = SPECS["linear_mixed"]
    case = next(c for c in spec.cases() if rows_of(c) == 5 and len(c.inputs["columns"]) == 0 or rows_of(c) == 6)
    x = case.inputs["x"].reshape(6, -1).copy()
    x[2, case.inputs["columns"][1]] = np.inf
    with dispatch.forced("dot", **CONFIGS["dot"]):
        y = run(spec, replace(case, inputs={**case.inputs, "x": x}))
    assert torch.isnan(y[2]).all() and torch.isfinite(y[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("kernel", ["gemv", "dot", "matmul"])
def test_the_same_bits_in_every_run(kernel: str) -> None:
    spec = SPECS["linear_nbit"]
    able = [c for c in spec.cases() if rows_of(c) and kernel in kernels("linear_nbit", c)]
    for case in able[7 :: len(able) // 2]:
        with dispatch.forced(kernel, **CONFIGS[kernel]):
            check_repeats(spec, case, torch.float16)


def test_rows_sorted_by_expert() -> None:
    expert = torch.tensor([3, 0, 3, 3, 1, 3, 3], device=DEVICE)
    order, owner = blocks_of_rows(expert, 5, 2)
    blocks = [(int(e), [r for r in rows if r < 7]) for e, rows in zip(owner, order.view(-1, 2).tolist(), strict=True)]
    assert [b for b in blocks if b[1]] == [(0, [1]), (1, [4]), (3, [0, 2]), (3, [3, 5]), (3, [6])]
    assert all(e == 5 for e, rows in blocks if not rows)


# ---- refused


def plain_call(**changed) -> list:
    spec = SPECS["linear_nbit"]
    case = next(c for c in spec.cases() if rows_of(c) == 3 and c.attributes["activation"] == 0)
    values = {i.name: case.inputs.get(i.name) for i in spec.inputs}
    values |= dict(zip(spec.attributes, spec.values(case.attributes), strict=True))
    values = {name: torch.from_numpy(v).to(DEVICE) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    return list((values | changed).values())


@pytest.mark.parametrize(
    "changed,error,message",
    [
        ({"x": torch.zeros(3, 95, device=DEVICE)}, InputError, "x has 95 columns, the weight 96"),
        ({"x": torch.zeros(3, 96, dtype=torch.float64, device=DEVICE)}, UnsupportedError, "x is torch.float64"),
        ({"k": 97, "x": torch.zeros(3, 97, device=DEVICE)}, InputError, "codes is torch.uint8"),
        ({"bias": torch.zeros(32, device=DEVICE)}, InputError, r"bias is torch.float32 \[32\].*expected torch.float32 \[33\]"),
        ({"activation": 3}, InputError, "activation_scale is given for int8-static activations and for no others"),
        ({"residual": torch.zeros(3, 1, device=DEVICE)}, InputError, r"residual is torch.float32 \[3, 1\]"),
        ({"gate": 1}, ValueError, "two halves of a multiple of 16 rows"),
    ],
)
def test_calls_that_do_not_fit(changed, error, message: str) -> None:
    with pytest.raises(error, match=message):
        implementation("linear_nbit")(*plain_call(**changed))


def test_indices_outside() -> None:
    if CUDA:
        pytest.skip("a device assertion ends the process")
    for op, name in (("embedding_nbit", "indices"), ("linear_experts_nbit", "expert")):
        spec = SPECS[op]
        case = next(c for c in spec.cases() if c.inputs[name].size > 1)
        for bad in (10**6, -(10**6)):
            where = case.inputs[name].copy()
            where.flat[1] = bad
            with pytest.raises(RuntimeError, match="outside"):
                run(spec, replace(case, inputs={**case.inputs, name: where}))


def test_negative_indices_count_from_the_end() -> None:
    spec = SPECS["embedding_nbit"]
    case = next(iter(spec.cases()))
    turned = replace(case, inputs={**case.inputs, "indices": case.inputs["indices"] - case.attributes["n"]})
    assert torch.equal(run(spec, case), run(spec, turned))


def test_a_kernel_that_does_not_compute_a_call_is_named() -> None:
    case = next(c for c in SPECS["linear_nbit"].cases() if c.attributes["activation"] == Activation.INT8_BLOCK)
    refused = pytest.raises(UnsupportedError, match="names kernel 'matmul', which does not compute")
    with dispatch.forced("matmul", chunk=0), refused:
        run(SPECS["linear_nbit"], case)


def test_sums_that_may_not_fit_int32_are_refused() -> None:
    from qcompiler.gpu.linear_nbit import check_sums
    from qcompiler.gpu.weight import Weight

    empty = torch.empty(0)
    weight = Weight(empty, empty, None, AffineFormat(8, 0), 16, 132_105)
    with pytest.raises(UnsupportedError, match="which holds 132104; use groups"):
        check_sums("linear_nbit", weight, Activation.INT8_TOKEN, False)
    check_sums("linear_nbit", replace(weight, k=132_104), Activation.INT8_TOKEN, False)
    with pytest.raises(UnsupportedError, match="which holds 66311"):
        check_sums("linear_nbit", replace(weight, zeros=empty), Activation.INT8_TOKEN, False)
