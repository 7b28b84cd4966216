"""The declaration of an op: one object from which every backend is made.

From an `OpSpec` come the torch schema, its fake and its CPU implementation (`qcompiler.ops.torch_ops`), the ONNX schema, the
translation and the function body (`qcompiler.ops.onnx_ops`), the name of the C entry point (`qcompiler.runtime.library`),
and the cases that both the parity test and the benchmark run. Plain data and numpy: imports without torch and onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DOMAIN = "ai.qcompiler"
OPSET = 1


@dataclass(frozen=True)
class Input:
    """One input: its name, its numpy dtype, and whether a node may leave it out."""

    name: str
    dtype: str
    optional: bool = False


@dataclass(frozen=True)
class Case:
    """One call of an op: `inputs` by name (absent optional ones are None), `attributes` by name, a readable `label`."""

    label: str
    inputs: Mapping[str, np.ndarray | None]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """A quantized op.

    Attributes:
        name: of the torch op `qcompiler::<name>` and of the C function `qc_<name>`.
        onnx_name: of the node in domain `ai.qcompiler`.
        inputs, attributes: in order; every attribute is an integer, but for those with a default that is a float.
        output_shape: `(shapes of the inputs by name, attributes) -> shape`; symbolic sizes pass through.
        reference: `(inputs by name, attributes) -> float32 array`; slow, exact, the truth that kernels are held to.
        variant: `(attributes, names of the inputs present) -> label` of the function body that this call needs.
        cases: what the parity test and the benchmark run.
        defaults: of the attributes that a node may leave out.
    """

    name: str
    onnx_name: str
    doc: str
    inputs: tuple[Input, ...]
    attributes: tuple[str, ...]
    output_shape: Callable[[Mapping[str, tuple], Mapping[str, Any]], tuple]
    reference: Callable[[Mapping[str, Any], Mapping[str, Any]], np.ndarray]
    variant: Callable[[Mapping[str, Any], frozenset[str]], str]
    cases: Callable[[], Iterable[Case]] = field(default=tuple)
    defaults: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def torch_schema(self) -> str:
        """For instance `linear_nbit(Tensor x, …, Tensor? bias, int bits, …) -> Tensor`."""
        arguments = [f"Tensor{'?' if i.optional else ''} {i.name}" for i in self.inputs]
        arguments += [f"{'float' if self.is_float(name) else 'int'} {name}" for name in self.attributes]
        return f"{self.name}({', '.join(arguments)}) -> Tensor"

    def is_float(self, attribute: str) -> bool:
        return isinstance(self.defaults.get(attribute), float)

    def values(self, attributes: Mapping[str, Any]) -> tuple[int | float, ...]:
        """The attributes in order, as the torch op takes them behind the inputs; those left out have their default.

        Raises:
            KeyError: one without a default is missing.
        """
        return tuple(self.defaults[n] if n in self.defaults and n not in attributes else attributes[n] for n in self.attributes)

    def read(self, attributes: Any) -> dict[str, Any]:
        """The attributes of an ONNX node (`onnx_ir.Attributes`) by name; those left out have their default, or None."""
        read = lambda name: attributes.get_float if self.is_float(name) else attributes.get_int  # noqa: E731
        return {name: read(name)(name, self.defaults.get(name)) for name in self.attributes}


SPECS: dict[str, OpSpec] = {}


def declare(spec: OpSpec) -> OpSpec:
    """Add `spec` to the table that every backend reads."""
    if spec.name in SPECS:
        raise ValueError(f"op {spec.name!r} is declared twice")
    SPECS[spec.name] = spec
    return spec
