"""The target `onnx-stock`: every declared case in an unmodified ONNX Runtime, and what a lowered model consists of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qcompiler
from qcompiler import recipe as recipes
from qcompiler.errors import UnsupportedError
from qcompiler.lower.external import INLINE_BYTES
from qcompiler.lower.stock import BITS, MICROSOFT, check_recipe, to_stock
from qcompiler.lower.stock_products import takes_static
from qcompiler.ops import SPECS, layout
from qcompiler.ops.formats import Activation, AffineFormat
from qcompiler.ops.linear_mixed import random_outliers
from qcompiler.ops.linear_nbit import random_range, random_weight
from qcompiler.ops.onnx_ops import single_node_model
from qcompiler.ops.spec import DOMAIN, OPSET, Case, OpSpec
from tests.models import tiny

# Relative to the largest value. Stock int8 activations have a scale a block of the weight, ours a token or 128 inputs.
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 2e-2
GROUPS: dict[tuple[str, str], list] = {}
for _spec in (spec for spec in SPECS.values() if "bits" in spec.attributes):
    for _case in (c for c in _spec.cases() if "gate" not in c.attributes):  # edges are refused: test_linear_edges.py
        GROUPS.setdefault((_spec.name, _case.label.split(" ")[0]), []).append((_spec, _case))


def supported(spec: OpSpec, case: Case) -> bool:
    attributes = case.attributes
    format = AffineFormat(attributes["bits"], attributes["group"], case.inputs["zeros"] is None)
    if attributes.get("activation") == Activation.INT8_STATIC:
        return takes_static(format)
    return format.bits in BITS


SUPPORTED: dict[tuple[str, str], list] = {}
REFUSED: dict[tuple[str, str], list] = {}
for _key, _cases in GROUPS.items():
    for _pair in _cases:
        (SUPPORTED if supported(*_pair) else REFUSED).setdefault(_key, []).append(_pair)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_stock(model: ir.Model) -> None:
    """Nothing of ours is left: no node, no function, no opset import."""
    assert {node.domain for node in model.graph.all_nodes()} <= {"", MICROSOFT}
    assert not model.functions
    assert model.graph.opset_imports.keys() <= {"", MICROSOFT} and model.graph.opset_imports[MICROSOFT] == 1
    assert all(value.uses() or value.is_graph_output() for value in model.graph.initializers.values())


@pytest.mark.parametrize("name,format", SUPPORTED, ids=str)
def test_every_case_gives_what_the_reference_gives(name: str, format: str) -> None:
    for spec, case in SUPPORTED[name, format]:
        model = single_node_model(spec, case)
        sizes = to_stock(model)
        assert_stock(model)
        # small ones are not counted
        own = ("bias", "expert", *(f"input_{part}" for part in ("scale", "zero")), "kept_columns", "outlier_")
        stored = sum(
            v.const_value.nbytes
            for k, v in model.graph.initializers.items()
            if not k.startswith(own) or (k not in ("bias", "expert") and v.const_value.nbytes > INLINE_BYTES)
        )
        assert sum(sizes["codes"].values()) == stored, case.label
        first = spec.inputs[0].name
        (found,) = run(model, {first: case.inputs[first]})
        expected = spec.reference(case.inputs, case.attributes)
        assert found.shape == expected.shape and found.dtype == expected.dtype, case.label
        if expected.size:
            activation = case.attributes.get("activation", Activation.FLOAT)
            # with a zero point the range is the same; without one, stock has one more level below
            exact = activation == Activation.FLOAT or case.inputs.get("activation_zero") is not None
            scale = np.abs(expected).max() * (FLOAT_TOLERANCE if exact else INT8_TOLERANCE)
            np.testing.assert_allclose(found, expected, rtol=0, atol=scale, err_msg=case.label)


@pytest.mark.parametrize("name,format", REFUSED, ids=str)
def test_other_widths_are_refused(name: str, format: str) -> None:
    for spec, case in {pair[1].attributes.get("activation"): pair for pair in REFUSED[name, format]}.values():
        with pytest.raises(UnsupportedError, match=f"no kernel for {format}"):
            to_stock(single_node_model(spec, case))


@pytest.mark.parametrize("name", ["linear_vq", "embedding_vq"])
def test_codebooks_are_refused(name: str) -> None:
    spec = SPECS[name]
    with pytest.raises(UnsupportedError, match=f"`onnx-stock` has nothing in place of {spec.onnx_name}"):
        to_stock(single_node_model(spec, next(iter(spec.cases()))))


def test_the_recipe_is_refused_by_name_with_the_nearest_that_works() -> None:
    with pytest.raises(UnsupportedError, match="linear: .* for int3-g32-asym; nearest: int4-g32-asym or int2-g32-asym") as error:
        check_recipe(recipes.load("int3"))
    assert error.value.exit_code == 4
    for name in ("int8", "int4", "int4-asym", "int2"):
        check_recipe(recipes.load(name))


def test_static_activations_need_8_bits_and_one_scale_a_row() -> None:
    words = "linear: .* for int4-g32-sym with int8-static activations; nearest: int8-row-sym with int8-static, or int4-g32-sym"
    grouped = {"bits": 4, "group": 32, "activations": "int8-static"}
    with pytest.raises(UnsupportedError, match=words) as error:
        check_recipe(recipes.load({"name": "static", "linear": grouped}))
    assert error.value.exit_code == 4
    check_recipe(recipes.load({"name": "static", "linear": {"bits": 8, "activations": "int8-static"}}))


@pytest.mark.parametrize("name", ["linear_nbit", "linear_mixed"])
def test_a_static_product_stays_in_integers(name: str, tmp_path: Path) -> None:
    """What ONNX Runtime runs after its own optimizations: no weight became float, the product is the integer one."""
    case = static_case(name, n=64, k=96)
    model = single_node_model(SPECS[name], case)
    to_stock(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": case.inputs["x"]})
    events = json.loads(Path(session.end_profiling()).read_text())
    executed = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert {"QuantizeLinear", "MatMulIntegerToFloat"} <= executed
    outlier_columns = name == "linear_mixed"  # in float, with their sum
    assert bool({"MatMul", "Gemm"} & executed) == outlier_columns, executed
    floats = [v for v in ir.load(tmp_path / "optimized.onnx").graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert max(v.const_value.size for v in floats) < 64 * 96 // 4


def static_case(name: str, n: int, k: int) -> Case:
    rng = np.random.default_rng(0)
    tensors, attributes = random_weight(rng, n, k, AffineFormat(8, 0))
    tensors |= random_range(rng, tensors, attributes, Activation.INT8_STATIC, True)
    own = random_outliers(rng, n, k, 2) if name == "linear_mixed" else {}
    x = rng.standard_normal((3, k)).astype(np.float32)
    return Case("static", {"x": x, **tensors, **own}, {**attributes, "activation": int(Activation.INT8_STATIC)})


def test_compile_refuses_before_it_looks_at_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="recipe int3: linear"):
        qcompiler.compile(tmp_path / "no such model", output=tmp_path / "out", recipe="int3", target="onnx-stock")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_pair_reads_one_tensor(symmetric: bool) -> None:
    n, k = 47, 96
    format = AffineFormat(8, 32, symmetric)
    tensors, attributes = random_weight(np.random.default_rng(0), n, k, format)
    packed = {name: array for name, array in tensors.items() if array is not None}
    shared = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in packed.items()]
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "length"]))
    rows = ir.node("EmbeddingNBit", [ids, *shared], attributes=attributes, domain=DOMAIN)
    again = ir.node("EmbeddingNBit", [ids, *shared], attributes=attributes, domain=DOMAIN)
    both = ir.node("Add", [rows.outputs[0], again.outputs[0]])
    head = ir.node("LinearNBit", [both.outputs[0], *shared], attributes=attributes | {"activation": 0}, domain=DOMAIN)
    output = head.outputs[0]
    output.name, output.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 21, DOMAIN: OPSET}
    nodes = [rows, again, both, head]
    graph = ir.Graph([ids], [output], nodes=nodes, initializers=shared, opset_imports=imports, name="tied")
    model = ir.Model(graph, ir_version=10)
    sizes = to_stock(model)
    assert_stock(model)
    blocks, scales = ((n, 3, 32), "UINT8"), ((n, 3), "FLOAT")
    kinds = [(tuple(v.shape), v.dtype.name) for v in model.graph.initializers.values()]
    zeros = [] if symmetric else [((n, 3), "UINT8")] * 2  # as the product reads them, and as the lookup does
    assert sorted(kinds) == sorted([blocks, scales, *zeros])
    assert list(sizes) == ["codes"]
    assert sizes["codes"] == {"codes": n * k, "scales": 4 * n * 3, "zeros": len(zeros) * n * 3, "padding": 0}
    codes, points = layout.unpack_codes(tensors["codes"], n, k, 8), tensors["zeros"]
    points = None if symmetric else layout.unpack_zeros(points, n, 8)
    table = layout.dequantize(codes, layout.unpack_scales(tensors["scales"], n), points, format)
    tokens = np.array([[3, 46, 0, 3]])
    (found,) = run(model, {"ids": tokens})
    expected = 2 * table[tokens] @ table.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT_TOLERANCE * np.abs(expected).max())


# ---- what the records say about the files


def assert_every_byte_is_accounted_for(artifact: Path) -> dict:
    layers = json.loads((artifact / "layers.json").read_text())
    totals = dict(layers["totals"]["bytes"])
    total = totals.pop("total")
    files = sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert sum(totals.values()) == total == files
    assert min(totals.values()) >= 0
    packed = sum(totals[kind] for kind in ("codes", "scales", "zeros", "padding"))
    quantized = [r for r in layers["layers"] if r["format"] != "float32"]
    once = {(r["packed_as"], *r["packed_rows"]): r for r in quantized}  # a tied pair reads the same rows
    assert sum(r["bytes"] for r in once.values()) == packed
    model = ir.load(artifact / "model.onnx")
    tensors = {v.name: v.const_value.nbytes for v in model.graph.initializers.values()}
    for name in {r["packed_as"] for r in quantized}:
        parts = [r["bytes"] for (owner, *_), r in once.items() if owner == name]
        assert sum(parts) == sum(size for key, size in tensors.items() if key.startswith(f"{name}.")), name
    for record in once.values():
        assert record["bits_per_weight"] == pytest.approx(8 * record["bytes"] / np.prod(record["shape"]), abs=1e-3)
    return layers


@pytest.mark.parametrize("recipe", ["int4", "int4-asym"])
@pytest.mark.parametrize("target", ["onnx", "onnx-stock"])
def test_every_byte_of_a_small_model_is_accounted_for(tmp_path: Path, target: str, recipe: str) -> None:
    result = qcompiler.compile(tiny("llama"), output=tmp_path / "artifact", recipe=recipe, target=target)
    layers = assert_every_byte_is_accounted_for(result.path)
    bits = {r["bits_per_weight"] for r in layers["layers"] if r["format"] == "int4-g32-sym"}
    ops = json.loads((result.path / "trace" / "lowering.json").read_text())["ops"]
    assert any(DOMAIN in op for op in ops) == (target == "onnx")
    assert any("MatMulNBits" in op for op in ops) == (target == "onnx-stock")
    # float32 scales instead of float16
    assert bits <= ({5.0} if target == "onnx-stock" else {4.5})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "onnx-stock"])
def test_every_byte_of_the_reference_model_is_accounted_for(tmp_path: Path, target: str) -> None:
    result = qcompiler.compile("reference", output=tmp_path / "artifact", target=target)
    assert_every_byte_is_accounted_for(result.path)
