"""How a case of an op runs on a GPU, or interpreted on the CPU, and how far from the reference its result may be.

The expected value is `spec.reference` of x as the op gets it: rounded to the dtype under test, widened again. What separates
the result from it is rounding alone, and the bound on that is arithmetic (`tolerance`), the same for every kernel:

    float32 sums of k terms in any order         k · 2^-24 · Σ |x| · |W|     (Σ a·q − Z · Σ a instead of Σ a·(q − Z) doubles it)
    x after a norm, W of a scratch, in the dtype  u · Σ |x| · |W| each, u = 2^-24, 2^-11, 2^-8
    y, and the product of a matmul before edges   u · |y|
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from qcompiler.ops import linear_edges
from qcompiler.ops.formats import Activation
from qcompiler.ops.linear_edges import Gate
from qcompiler.ops.spec import Case, OpSpec

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 100 if CUDA else 2
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if CUDA else ())
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Greatest slope of silu, gelu_tanh and gelu.
SLOPE = 1.13


def dtype_label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with an x that the dtype holds exactly."""
    if "x" not in case.inputs:
        return case
    x = torch.from_numpy(np.ascontiguousarray(case.inputs["x"])).to(dtype).float().numpy()
    return replace(case, inputs={**case.inputs, "x": x})


def tensors(spec: OpSpec, case: Case, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """The op's inputs on the device; x in the dtype."""
    result: list[torch.Tensor | None] = []
    for given in spec.inputs:
        array = case.inputs.get(given.name)
        tensor = None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)
        result.append(tensor.to(dtype) if tensor is not None and given.name == "x" else tensor)
    return result


def run(spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The op's CUDA implementation on the device of the tests, through the registered op where that is a GPU."""
    values = (*tensors(spec, case, dtype), *spec.values(case.attributes))
    if CUDA:
        from qcompiler.ops.torch_ops import overload

        return overload(spec.name)(*values)
    from qcompiler.gpu import implementation

    return implementation(spec.name)(*values)


def dense(spec: OpSpec, case: Case) -> np.ndarray:
    """|W| of a linear op, float64 `[n, k]` (`[experts, n, k]`): its reference on the unit vectors."""
    k = case.attributes["k"]
    unit = np.eye(k, dtype=np.float32)
    plain: dict[str, Any] = {name: None for name in case.inputs if name.startswith("activation_")}
    plain |= {"bias": None, "residual": None, "norm": None, "x": unit}
    attributes = {**case.attributes, "activation": int(Activation.FLOAT)}
    attributes |= {name: value for name, value in linear_edges.DEFAULTS.items() if name in attributes}
    if "experts" not in attributes:
        return np.abs(spec.reference({**case.inputs, **plain}, attributes)).T.astype(np.float64)
    each = [np.full(k, e) for e in range(attributes["experts"])]
    return np.stack([np.abs(spec.reference({**case.inputs, **plain, "expert": e}, attributes)).T for e in each])


def tolerance(spec: OpSpec, case: Case, dtype: torch.dtype, expected: np.ndarray) -> np.ndarray:
    """Bound on |found − expected|, of the shape of y: see the module."""
    k, u, kind = case.attributes["k"], ROUNDING[dtype], Activation(case.attributes["activation"])
    x = np.abs(linear_edges.normalized(case.inputs, case.attributes)).astype(np.float64)
    if kind is Activation.INT8_STATIC:  # of up to 255 steps, before the offset cancels them
        x = x + 255 * float(case.inputs["activation_scale"][0])
    elif kind is not Activation.FLOAT and x.size:  # half a step more at most
        x = x + x.max(axis=-1, keepdims=True) / 254
    # Of a row's greatest weight throughout: |q| may be twice what |q − Z| is.
    weight = dense(spec, case)
    weight = np.broadcast_to(weight.max(axis=-1, keepdims=True), weight.shape)
    if weight.ndim == 3:
        rows = x.reshape(-1, k)
        sums = np.einsum("rk,rnk->rn", rows, weight[case.inputs["expert"]]).reshape(expected.shape)
    else:
        sums = x @ weight.T
    terms = 2 * k * 2.0**-24 + 2 * u
    error = terms * sums
    gate, residual = case.attributes.get("gate", 0), case.inputs.get("residual")
    if gate or residual is not None:
        plain = {**case.inputs, "residual": None}
        product = np.abs(spec.reference(plain, {**case.attributes, "gate": 0})).astype(np.float64)
        error = error + u * product
        if gate:
            first, second = np.split(product, 2, axis=-1)
            e1, e2 = np.split(error, 2, axis=-1)
            # exp and erf of a GPU are within 2^-20 of their arguments' worth
            error = SLOPE * e1 * (second + e2) + SLOPE * first * e2 + 2.0**-20 * first * second
        assert gate in tuple(Gate)
    return error + (u + 2.0**-23) * np.abs(expected) + 1e-30


def check(spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The op's result has the shape and dtype of the declaration and is the reference's, within the bound."""
    case = rounded(case, dtype)
    expected = spec.reference(case.inputs, case.attributes)
    y = run(spec, case, dtype)
    label = f"{spec.name} {dtype_label(dtype)}: {case.label}"
    assert y.shape == expected.shape and y.device.type == DEVICE.type, label
    found = y.float().cpu().numpy()
    if "x" not in case.inputs:  # an embedding: the same bits
        assert y.dtype == torch.float32, label
        np.testing.assert_array_equal(found, expected, err_msg=label)
        return
    assert y.dtype == dtype, label
    if not expected.size:
        return
    excess = np.abs(found.astype(np.float64) - expected) / tolerance(spec, case, dtype, expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    assert excess[worst] <= 1, f"{label}: {found[worst]} at {worst}, expected {expected[worst]}, {excess[worst]:.1f} bounds off"


def check_repeats(spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The same bits in every run."""
    case = rounded(case, dtype)
    first = run(spec, case, dtype)
    for _ in range(REPEATS - 1):
        assert torch.equal(run(spec, case, dtype), first), f"{spec.name} {dtype_label(dtype)}: {case.label}"


def features(case: Case) -> set[tuple]:
    """What a sample should have in it: every two of width, group, symmetry and kind of activations together; edges; shapes."""
    attributes, present = case.attributes, {n for n, value in case.inputs.items() if value is not None}
    choices = [(name, attributes.get(name)) for name in ("bits", "group", "activation")] + [("zeros", "zeros" in present)]
    rows = case.inputs["x" if "x" in present else "indices"]
    size = min(rows.size // (attributes["k"] if "x" in present else 1), 17)
    found = set(combinations(choices, 2)) | {("rows", size), ("gate", attributes.get("gate"))}
    found |= {(attributes.get("bits"), attributes.get("group"), "zeros" in present)}
    found |= {("entries", attributes.get("dim"), attributes.get("centroids"))}
    found |= {("n", attributes["n"] % 16 > 0), ("k", attributes["k"] % 128 > 0)}
    return found | {(name,) for name in present & {"bias", "norm", "residual", "activation_zero"}}


def sample(cases: Iterable[Case], everything: bool = False) -> Iterator[Case]:
    """A few cases that have all features of all of them, the same in every run; or all."""
    left = list(cases)
    if everything:
        yield from left
        return
    seen: set[tuple] = set()
    while True:
        best = max(left, key=lambda case: (len(features(case) - seen), -case.attributes["n"] * case.attributes["k"]))
        if not features(best) - seen:
            return
        yield best
        seen |= features(best)
