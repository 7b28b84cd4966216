"""The ONNX face of every declared op: schema, translation from torch, function bodies.

Registering the schema with `onnx.defs` and the translation with onnxscript's `torch_op` makes every `torch.onnx.export`, also
the unmodified exporter of transformers, emit a node of our domain.
"""

from __future__ import annotations

import builtins
import functools
import linecache

import onnx
import onnx_ir as ir
import onnxscript
from onnxscript.function_libs.torch_lib.registration import default_registry, torch_op

from qcompiler.errors import UnsupportedError
from qcompiler.ops import SPECS, experts_linear_onnx
from qcompiler.ops.bodies import BUILDERS
from qcompiler.ops.body_builder import STANDARD_OPSET, marker
from qcompiler.ops.spec import DOMAIN, OPSET, OpSpec

_ONNX_TYPE = {"float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)"}
_ONNX_TYPE |= {name: f"tensor({name})" for name in ("int8", "int32", "int64")}


def _schema(spec: OpSpec) -> onnx.defs.OpSchema:
    S = onnx.defs.OpSchema
    option = {False: S.FormalParameterOption.Single, True: S.FormalParameterOption.Optional}
    return S(
        spec.onnx_name,
        DOMAIN,
        OPSET,
        doc=spec.doc,
        inputs=[S.FormalParameter(i.name, _ONNX_TYPE[i.dtype], param_option=option[i.optional]) for i in spec.inputs],
        outputs=[S.FormalParameter("y", "tensor(float)")],
        attributes=[_attribute(spec, name) for name in spec.attributes],
    )


def _attribute(spec: OpSpec, name: str) -> onnx.defs.OpSchema.Attribute:
    A = onnx.defs.OpSchema.Attribute
    if name in spec.defaults:
        return A(name, onnx.helper.make_attribute(name, spec.defaults[name]))
    return A(name, onnx.defs.OpSchema.AttrType.INT, required=True)


def _translation(spec: OpSpec):
    """The function that torch.onnx calls for `qcompiler::<name>`.

    onnxscript reads its signature and its source, so it is written out, and kept where `inspect` finds it.
    """
    domain = onnxscript.values.Opset(DOMAIN, OPSET)
    # In the order of the declaration. Python wants a default for whatever follows an optional input.
    first = next((index for index, i in enumerate(spec.inputs) if i.optional), len(spec.inputs))
    inputs = [i.name if index < first else f"{i.name}=None" for index, i in enumerate(spec.inputs)]
    attributes = (f"{name}: float = 0.0" if spec.is_float(name) else f"{name}: int = 0" for name in spec.attributes)
    arguments = ", ".join([*inputs, *attributes])
    call = ", ".join([*(i.name for i in spec.inputs), *(f"{name}={name}" for name in spec.attributes)])
    scope: dict = {"emit": getattr(domain, spec.onnx_name), "__name__": __name__}
    source, filename = f"def {spec.name}({arguments}):\n    return emit({call})\n", f"<qcompiler op {spec.name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(builtins.compile(source, filename, "exec"), scope)  # noqa: S102  names come from our own declarations
    return scope[spec.name]


@functools.cache
def register() -> None:
    """Register schema and translation of every op; idempotent.

    Raises:
        RuntimeError: a registration did not take (torch would only log it and fail later).
    """
    experts_linear_onnx.register()
    for spec in SPECS.values():
        if not onnx.defs.has(spec.onnx_name, DOMAIN):
            onnx.defs.register_schema(_schema(spec))
        torch_op(f"qcompiler::{spec.name}", trace_only=True)(_translation(spec))
        if f"qcompiler::{spec.name}" not in default_registry:
            raise RuntimeError(f"onnxscript did not register qcompiler::{spec.name}; this version of onnxscript is not supported")


def attach_bodies(model: ir.Model) -> dict[str, int]:
    """Give every node of our domain its function body, as a model-local function with the variant as overload.

    Args:
        model: changed in place; its IR version becomes at least 10 (overloads). Nodes of other ops keep a body that they have.

    Returns:
        Number of nodes by `<op>/<variant>`.
    """
    by_name = {spec.onnx_name: spec for spec in SPECS.values()}
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        spec = by_name.get(node.op_type)
        if spec is None and (DOMAIN, node.op_type, node.overload) in model.functions:
            continue  # no op of a weight: its body came with it
        if spec is None:
            raise UnsupportedError(f"node {node.name!r}: op {DOMAIN}::{node.op_type} is not declared")
        attributes = spec.read(node.attributes)
        present = frozenset(i.name for i, value in zip(spec.inputs, node.inputs, strict=False) if value is not None)
        node.overload = spec.variant(attributes, present)
        node.attributes.add(ir.AttrInt64(marker(node.overload), 1))
        key = (DOMAIN, spec.onnx_name, node.overload)
        if key not in model.functions:
            model.functions[key] = BUILDERS[spec.name](spec, node.overload, attributes, present)
        label = f"{spec.onnx_name}/{node.overload}"
        counts[label] = counts.get(label, 0) + 1
    if counts:
        model.ir_version = max(model.ir_version, 10)
        model.graph.opset_imports.setdefault(DOMAIN, OPSET)
    return counts


def single_node_model(spec: OpSpec, case, *, bodies: bool = True) -> ir.Model:
    """A model of one node for a case: activations or indices are the graph input, everything else initializers."""
    first = spec.inputs[0].name
    values: list[ir.Value | None] = []
    initializers, inputs = [], []
    for declared in spec.inputs:
        array = case.inputs.get(declared.name)
        if array is None:
            values.append(None)
            continue
        value = ir.Value(name=declared.name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        if declared.name == first:
            columns = list(array.shape[-1:]) if declared.name == "x" else []  # of activations; every other axis may vary
            value.shape = ir.Shape([f"d{i}" for i in range(array.ndim - len(columns))] + columns)
            inputs.append(value)
        else:
            value.shape, value.const_value = ir.Shape(array.shape), ir.tensor(array, name=declared.name)
            initializers.append(value)
        values.append(value)
    while values and values[-1] is None:
        values.pop()
    node = ir.node(spec.onnx_name, values, attributes=dict(case.attributes), domain=DOMAIN, name="node")
    output = node.outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": STANDARD_OPSET, DOMAIN: OPSET}
    graph = ir.Graph(inputs, [output], nodes=[node], initializers=initializers, opset_imports=opsets, name=spec.name)
    model = ir.Model(graph, ir_version=10)
    if bodies:
        attach_bodies(model)
    return model
