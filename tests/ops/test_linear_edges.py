"""The edges of linear ops: their arithmetic beside torch's, their way through the exporter, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import UnsupportedError
from qcompiler.lower.stock import to_stock
from qcompiler.ops import SPECS
from qcompiler.ops.linear_edges import Gate, finished, normalize
from qcompiler.ops.onnx_ops import attach_bodies, register, single_node_model
from qcompiler.ops.spec import Case, OpSpec
from qcompiler.ops.torch_ops import overload

register()
OPS = ("linear_nbit", "linear_vq")


def edged(spec: OpSpec, *words: str) -> Case:
    """The first case whose edges are these: a gate's label, "norm", "residual"."""
    found = (c for c in spec.cases() if c.attributes.get("gate") is not None and c.inputs["x"].size)
    return next(c for c in found if set(spec.variant(c.attributes, present(c)).split("_")) >= {*words})


def present(case: Case) -> frozenset[str]:
    return frozenset(name for name, value in case.inputs.items() if value is not None)


# ---- arithmetic


@pytest.mark.parametrize("k", [1, 15, 16, 17, 1000])
def test_the_norm_is_torchs(k: int) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((4, k)) * [[1e-3], [1], [1e3], [1e18]]).astype(np.float32)
    weight = rng.uniform(0.5, 2, k).astype(np.float32)
    wide = [torch.from_numpy(a).double() for a in (x, weight)]
    expected = torch.nn.functional.rms_norm(wide[0], (k,), wide[1], float(np.float32(1e-5)))
    # the factor and two products, each rounded to float32
    np.testing.assert_allclose(normalize(x, weight, 1e-5), expected.numpy(), rtol=1.5 * 2**-23)


def test_the_norm_does_not_overflow() -> None:
    """The squares of the largest floats sum up in double; torch's in float32 are infinite."""
    x = np.full((1, 64), np.finfo(np.float32).max)
    np.testing.assert_allclose(normalize(x, np.ones(64, np.float32), 0), 1, rtol=2**-22)


@pytest.mark.parametrize("gate", list(Gate)[1:], ids=lambda g: g.label)
def test_activations_are_torchs(gate: Gate) -> None:
    p = np.concatenate([np.linspace(-20, 20, 4001), [1e-30, -1e-30, 0.0, 3e38]]).astype(np.float32)
    wide, functional = torch.from_numpy(p).double(), torch.nn.functional
    expected = {
        Gate.SILU: lambda: functional.silu(wide),
        Gate.GELU_TANH: lambda: functional.gelu(wide, approximate="tanh"),
        Gate.GELU: lambda: functional.gelu(wide),
    }[gate]().numpy()
    found = finished(np.concatenate([p, np.ones_like(p)]), {}, {"gate": int(gate), "n": 2 * p.size})
    # torch's 1 + tanh and 1 + erf have an error of 2^-53 beside 1: what is left far below 0 is that, times x
    np.testing.assert_allclose(found, expected, rtol=2**-23, atol=2e-14)


# ---- the exporter


@pytest.mark.parametrize("name", OPS)
def test_export_from_torch_keeps_the_edges_in_their_places(name: str) -> None:
    spec = SPECS[name]
    case = edged(spec, "norm", "silu", "residual")
    inputs = {i.name: case.inputs.get(i.name) for i in spec.inputs}

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in spec.inputs[1:]:
                self.register_buffer(i.name, None if inputs[i.name] is None else torch.from_numpy(inputs[i.name]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = [getattr(self, i.name) for i in spec.inputs[1:]]
            return overload(name)(x, *held, *spec.values(case.attributes))

    x = torch.from_numpy(case.inputs["x"])
    program = torch.onnx.export(Module().eval(), (x,), dynamo=True, verbose=False)
    (node,) = (node for node in program.model.graph if node.op_type == spec.onnx_name)
    for declared, value in zip(spec.inputs[1:], node.inputs[1:], strict=True):
        assert (value is None) == (inputs[declared.name] is None)
        assert value is None or value.name == declared.name
    assert spec.read(node.attributes) == case.attributes
    assert node.attributes["epsilon"].type == ir.AttributeType.FLOAT
    (label,) = attach_bodies(program.model)
    assert label.endswith("_norm_silu_residual")


@pytest.mark.parametrize("name", OPS)
def test_nodes_without_the_new_attributes_have_none_of_the_edges(name: str) -> None:
    spec = SPECS[name]
    case = next(c for c in spec.cases() if "gate" not in c.attributes)
    (node,) = (node for node in single_node_model(spec, case).graph if node.op_type == spec.onnx_name)
    assert "gate" not in node.attributes and "epsilon" not in node.attributes
    assert spec.read(node.attributes) == {**case.attributes, "gate": 0, "epsilon": 0.0}
    assert spec.values(case.attributes)[-2:] == (0, 0.0)


# ---- what does not fit is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate": 4}, "gate is 4, expected 0 (none), 1 (silu), 2 (gelu-tanh), 3 (gelu)"),
        ({"gate": 1, "n": 40}, "two halves of a multiple of 16 rows, found n = 40"),
        ({"epsilon": 1e-5}, "epsilon is 1e-05 without the input norm"),
        ({"epsilon": -1.0}, "epsilon is -1.0, expected a finite number of at least 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_attributes_that_do_not_fit(name: str, changes: dict, message: str) -> None:
    spec = SPECS[name]
    case = next(c for c in spec.cases() if "gate" not in c.attributes)
    attributes = {**case.attributes, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.variant(attributes, present(case))
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.reference(case.inputs, attributes)


@pytest.mark.parametrize("name", OPS)
def test_tensors_that_do_not_fit(name: str) -> None:
    spec = SPECS[name]
    case = edged(spec, "norm", "silu", "residual")

    def run(**changes: torch.Tensor) -> torch.Tensor:
        given = {i: None if a is None else torch.from_numpy(np.array(a)) for i, a in case.inputs.items()} | changes
        return overload(name)(*(given.get(i.name) for i in spec.inputs), *spec.values(case.attributes))

    y, k = run(), case.attributes["k"]
    assert y.shape[-1] * 2 == case.attributes["n"]
    with pytest.raises(RuntimeError, match=rf"{name}: norm is torch.float32 \[{k + 1}\], expected torch.float32 \[{k}\]"):
        run(norm=torch.ones(k + 1))
    with pytest.raises(RuntimeError, match=f"{name}: residual is torch.float32 .*, expected torch.float32"):
        run(residual=torch.ones((*y.shape[:-1], case.attributes["n"])))
    with pytest.raises(RuntimeError, match=f"{name}: residual is torch.float64"):
        run(residual=torch.ones(y.shape, dtype=torch.float64))


def test_a_residual_need_not_be_contiguous() -> None:
    spec = SPECS["linear_nbit"]
    case = edged(spec, "norm", "gelu", "residual")
    tensors = [None if (a := case.inputs.get(i.name)) is None else torch.from_numpy(np.array(a)) for i in spec.inputs]
    at = [i.name for i in spec.inputs].index("residual")
    expected = overload(spec.name)(*tensors, *spec.values(case.attributes))
    tensors[at] = torch.stack([tensors[at], tensors[at] + 1], -1)[..., 0]
    assert not tensors[at].is_contiguous()
    assert torch.equal(overload(spec.name)(*tensors, *spec.values(case.attributes)), expected)


@pytest.mark.parametrize("words", [("silu",), ("norm",), ("residual",)], ids=str)
def test_stock_runtimes_have_no_op_for_them(words: tuple[str, ...]) -> None:
    spec = SPECS["linear_nbit"]
    case = edged(spec, *words)
    assert case.attributes["bits"] != 3  # of which it would not get so far
    with pytest.raises(UnsupportedError, match=f"node node: .*LinearNBit with {words[0].replace('silu', 'gate')}"):
        to_stock(single_node_model(spec, replace(case, label="")))
