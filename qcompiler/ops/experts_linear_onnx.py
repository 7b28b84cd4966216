"""ONNX form of `experts_linear`, for mixtures that a recipe leaves in float: stock ops, one product an expert."""

from __future__ import annotations

from onnxscript.function_libs.torch_lib.registration import default_registry, torch_op
from onnxscript.onnx_opset import opset18 as op

from qcompiler.ops.experts_linear import NAMESPACE

# Where a row belongs to no expert, the last Gather is sent out of bounds: an error and no wrong row.
_NOWHERE = 2**40


def experts_linear(x, expert, weight, bias=None):
    """Gather each expert's rows, multiply, and gather the results back into the order of the rows."""
    experts = weight.shape[0]
    if not isinstance(experts, int):
        raise ValueError(f"experts_linear: the number of experts is {experts}, expected a fixed one")
    split = lambda value: op.Split(value, axis=0, num_outputs=experts) if experts > 1 else [value]  # noqa: E731
    weights, biases = split(weight), None if bias is None else split(bias)
    flat, first = op.Constant(value_ints=[-1]), op.Constant(value_ints=[0])
    rows, results = [], []
    for index in range(experts):
        own = op.Reshape(op.NonZero(op.Equal(expert, op.Constant(value_int=index))), flat)
        y = op.MatMul(op.Gather(x, own, axis=0), op.Transpose(op.Squeeze(weights[index], first), perm=[1, 0]))
        results.append(y if biases is None else op.Add(y, biases[index]))
        rows.append(own)
    at, y = (op.Concat(*parts, axis=0) if experts > 1 else parts[0] for parts in (rows, results))
    places = op.Range(op.Constant(value_int=0), op.Size(at), op.Constant(value_int=1))
    nowhere = op.Expand(op.Constant(value_int=_NOWHERE), op.Shape(expert))
    return op.Gather(y, op.ScatterElements(nowhere, at, places, axis=0), axis=0)


def register() -> None:
    """Make torch's ONNX exporter know the op.

    Raises:
        RuntimeError: the registration did not take.
    """
    torch_op(f"{NAMESPACE}::experts_linear", trace_only=True)(experts_linear)
    if f"{NAMESPACE}::experts_linear" not in default_registry:
        raise RuntimeError(f"onnxscript did not register {NAMESPACE}::experts_linear; this version is not supported")
