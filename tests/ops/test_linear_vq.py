"""`linear_vq`, `embedding_vq`: what the format says of itself, and what is refused. Parity of the backends is in test_parity."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qcompiler.ops import SPECS, layout, vq_layout
from qcompiler.ops.formats import CENTROIDS, GROUPS, Activation, AffineFormat, VqFormat
from qcompiler.ops.linear_nbit import quantize_activations
from qcompiler.ops.linear_vq import ACTIVATIONS, random_weight
from qcompiler.ops.onnx_ops import attach_bodies, register, single_node_model
from qcompiler.ops.spec import Case
from qcompiler.ops.torch_ops import overload
from qcompiler.runtime import library, library_vq

register()
LINEAR, EMBEDDING = SPECS["linear_vq"], SPECS["embedding_vq"]
N, K = 37, 300
FORMATS = ["vq2d16-b16x128-g128", "vq2d32-b16x256-g64", "vq2d64-b32x256-row", "vq4d256-ballx128-row", "vq1d16-ballxall-g64"]


def linear(label: str, activation: Activation, rows: int = 4, n: int = N, k: int = K) -> Case:
    rng = np.random.default_rng(0)
    tensors, attributes = random_weight(rng, n, k, VqFormat.parse(label))
    x, bias = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    return Case(label, {"x": x, **tensors, "bias": bias}, {**attributes, "activation": int(activation)})


def embedding(case: Case, indices: np.ndarray) -> Case:
    """Rows of the same matrix."""
    tensors = {i.name: case.inputs[i.name] for i in EMBEDDING.inputs[1:]}
    return Case(case.label, {"indices": indices, **tensors}, {name: case.attributes[name] for name in EMBEDDING.attributes})


def changed(case: Case, **inputs: np.ndarray) -> Case:
    return Case(case.label, {**case.inputs, **inputs}, case.attributes)


def call(case: Case, isa: str | None = None, threads: int = 1) -> np.ndarray:
    given = {name: value for name, value in case.inputs.items() if value is not None}
    sizes = {name: value for name, value in case.attributes.items() if name != "layout_version"}
    run = library_vq.embedding_vq if "indices" in given else library_vq.linear_vq
    return run(**given, **sizes, isa=isa, threads=threads)


def torch_call(case: Case) -> np.ndarray:
    spec = EMBEDDING if "indices" in case.inputs else LINEAR
    tensors = [None if case.inputs.get(i.name) is None else torch.from_numpy(case.inputs[i.name]) for i in spec.inputs]
    return overload(spec.name)(*tensors, *spec.values(case.attributes)).numpy()


def onnx_call(case: Case, with_library: bool) -> np.ndarray:
    spec = EMBEDDING if "indices" in case.inputs else LINEAR
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if with_library:
        options.register_custom_ops_library(str(library.library_path()))
    content = ir.serde.serialize_model(single_node_model(spec, case, bodies=not with_library)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    first = spec.inputs[0].name
    return session.run(None, {first: case.inputs[first]})[0]


def everywhere(case: Case) -> dict[str, np.ndarray]:
    """The op on every backend, by name."""
    found = {isa: call(case, isa) for isa in library.isas()}
    return found | {"torch": torch_call(case), "onnx": onnx_call(case, True), "body": onnx_call(case, False)}


# ---- what it computes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", [(d, c) for d, counts in CENTROIDS.items() for c in counts if (d, c) != (2, 32)], ids=str)
def test_a_codebook_of_all_codes_is_the_affine_op_to_the_bit(kind: tuple[int, int], group: int) -> None:
    """With the grid of integers for a codebook an index is nothing but the codes of its columns."""
    dim, centroids = kind
    bits = (centroids.bit_length() - 1) // dim
    rng = np.random.default_rng(centroids)
    format, affine = VqFormat(dim, centroids, 0, 0, group), AffineFormat(bits, group)
    codes = layout.pack_codes(rng.integers(0, 2**bits, (N, 304)), bits)  # whole spans
    fields = np.arange(centroids)[:, None] >> bits * np.arange(dim) & (1 << bits) - 1
    shared = {"codes": codes, "scales": layout.pack_scales(rng.uniform(0.001, 0.02, (N, format.groups(K))))}
    books = {
        "codebooks": vq_layout.pack_codebooks(fields[None, None] - affine.center),
        "codebook_scales": np.ones((1, 1), np.float16),
    }
    sizes = {"group": group, "n": N, "k": K}
    form = {"dim": dim, "centroids": centroids, "block_rows": 0, "block_columns": 0}
    x = rng.standard_normal((3, K)).astype(np.float32)
    rows = np.array([0, 36, 17])
    for isa in library.isas():
        found = library_vq.embedding_vq(rows, **shared, **books, **form, **sizes, isa=isa)
        np.testing.assert_array_equal(found, library.embedding_nbit(rows, **shared, bits=bits, **sizes, isa=isa))
        # where the group is the row a float segment is another one
        for activation in ("float", "int8_block") if group else ("int8_block",):
            found = library_vq.linear_vq(x, **shared, **books, **form, **sizes, activation=activation, isa=isa)
            expected = library.linear_nbit(x, **shared, bits=bits, **sizes, activation=activation, isa=isa)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.label)
@pytest.mark.parametrize("label", FORMATS)
def test_it_is_the_product_with_the_decoded_matrix(label: str, activation: Activation) -> None:
    case = linear(label, activation)
    weight = call(embedding(case, np.arange(N))).astype(np.float64)
    x = case.inputs["x"]
    if activation is Activation.INT8_BLOCK:
        a, scale = quantize_activations(x, activation)
        x = a * scale.astype(np.float64)
    expected = x.astype(np.float64) @ weight.T + case.inputs["bias"]
    for name, found in everywhere(case).items():
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("label", ["vq2d16-b16x128-g128", "vq2d32-b32x128-row", "vq1d8-ballx128-g32", "vq4d256-b16xall-row"])
def test_a_codebook_counts_in_its_block_alone(label: str) -> None:
    format = VqFormat.parse(label)
    case = embedding(linear(label, Activation.FLOAT), np.arange(N))
    down, across = format.blocks(N, K)
    assert max(down, across) > 1
    before = call(case)
    for block in np.ndindex(down, across):
        rows = np.arange(N) // (format.block_rows or N) == block[0]
        columns = np.arange(K) // (format.block_columns or K) == block[1]
        inside = rows[:, None] & columns
        scales = case.inputs["codebook_scales"].copy()
        scales[block] *= 2
        books = case.inputs["codebooks"].copy()
        books[block] ^= 1
        for name, found in everywhere(changed(case, codebook_scales=scales)).items():
            np.testing.assert_array_equal(found, np.where(inside, 2 * before, before), err_msg=name)
        for name, found in everywhere(changed(case, codebooks=books)).items():
            np.testing.assert_array_equal(found[~inside], before[~inside], err_msg=name)
            assert (found[inside] != before[inside]).all(), name


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.label)
@pytest.mark.parametrize("label", ["vq2d16-ballxall-g32", "vq2d32-ballxall-row", "vq2d64-ballxall-g128", "vq4d256-ballxall-row"])
def test_padding_counts_nothing(label: str, activation: Activation) -> None:
    """Whatever indices lie beyond n and k."""
    n, k, format = 5, 37, VqFormat.parse(label)
    case = linear(label, activation, n=n, k=k)
    indices = vq_layout.unpack_indices(case.inputs["codes"], n, k, format)
    results = []
    for seed in range(2):
        columns = vq_layout.unit_columns(format) * case.inputs["codes"].shape[1]
        filled = np.random.default_rng(seed).integers(0, format.centroids, (16, format.vectors(columns)), np.uint8)
        filled[:n, : indices.shape[1]] = indices
        codes = vq_layout.pack_indices(filled, columns, format)
        assert codes.shape == case.inputs["codes"].shape
        results.append((codes, everywhere(changed(case, codes=codes))))
    assert (results[0][0] != results[1][0]).any()
    for name, found in results[0][1].items():
        np.testing.assert_array_equal(found, results[1][1][name], err_msg=name)
        np.testing.assert_allclose(found, LINEAR.reference(case.inputs, case.attributes), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.label)
@pytest.mark.parametrize("label", FORMATS)
def test_rows_isas_and_threads_change_no_bit(label: str, activation: Activation) -> None:
    case = linear(label, activation, rows=27, n=520, k=K)
    together = call(case)
    for isa in library.isas():
        np.testing.assert_array_equal(call(case, isa, threads=3), together)
        alone = [call(changed(case, x=case.inputs["x"][i : i + 1]), isa) for i in range(0, 27, 5)]
        np.testing.assert_array_equal(np.concatenate(alone), together[::5])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.label)
@pytest.mark.parametrize("label", FORMATS)
def test_activations_that_are_not_finite_make_their_row_nan(label: str, activation: Activation) -> None:
    case = linear(label, activation)
    clean, x = call(case), case.inputs["x"].copy()
    x[1, K - 1], x[3, 0] = np.inf, np.nan
    dirty = changed(case, x=x)
    for isa in library.isas():
        y = call(dirty, isa)
        assert (y.view(np.uint32)[[1, 3]] == 0x7FC00000).all()
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    if activation is not Activation.FLOAT:
        body = onnx_call(dirty, False)
        assert np.isnan(body[[1, 3]]).all()
        np.testing.assert_array_equal(body[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("label", FORMATS)
def test_decoding_reads_only_the_rows_asked_for(label: str) -> None:
    case = linear(label, Activation.FLOAT, n=100)
    whole = EMBEDDING.reference(embedding(case, np.arange(100)).inputs, case.attributes)
    for indices in (np.array(63), np.array([[99, 0], [16, 15]]), np.array([31, 31, 32]), np.zeros((2, 0), np.int64)):
        for name, found in everywhere(embedding(case, indices.astype(np.int64))).items():
            np.testing.assert_array_equal(found, whole[indices], err_msg=name)


# ---- what is refused


@pytest.mark.parametrize("activation", [Activation.INT8_TOKEN, Activation.INT8_STATIC], ids=lambda a: a.label)
def test_other_activations_are_refused_by_name(activation: Activation) -> None:
    case = linear(FORMATS[0], activation)
    words = f"linear_vq takes activations float, int8-block128, not {activation.label}"
    with pytest.raises(ValueError, match=words):
        LINEAR.reference(case.inputs, case.attributes)
    with pytest.raises(ValueError, match=words):
        LINEAR.variant(case.attributes, frozenset(case.inputs))
    with pytest.raises(ValueError, match=words):
        attach_bodies(single_node_model(LINEAR, case, bodies=False))
    words = rf"activation'? is {int(activation)} \(.*\), expected 0 \(float\) or 2 \(int8 per block"
    for run in (call, torch_call, lambda case: onnx_call(case, True)):
        with pytest.raises(Exception, match=words):
            run(case)


WRONG = {
    "codes": (lambda a: a[:, :-1], "[3, 19, 64]", "[3, 18, 64]"),
    "codebooks": (lambda a: a.swapaxes(2, 3), "[3, 3, 2, 16]", "[3, 3, 16, 2]"),
    "codebook_scales": (lambda a: a[:1], "[3, 3]", "[1, 3]"),
    "scales": (lambda a: a[:, :2], "[3, 3, 16]", "[3, 2, 16]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_of_another_shape_are_refused(name: str) -> None:
    change, expected, found = WRONG[name]
    case = linear(FORMATS[0], Activation.INT8_BLOCK)
    assert list(case.inputs[name].shape) == [int(size) for size in expected[1:-1].split(",")]
    case = changed(case, **{name: np.ascontiguousarray(change(case.inputs[name]))})
    words = rf"{name}\)? (is|are) .*{re.escape(found)}, expected .*{re.escape(expected)}"
    for own in (case, embedding(case, np.arange(3))):
        for run in (call, torch_call, lambda own: onnx_call(own, True)):
            with pytest.raises(Exception, match=words):
                run(own)


def test_tensors_of_another_type_are_refused() -> None:
    case = linear(FORMATS[0], Activation.FLOAT)
    unsigned = changed(case, codebooks=case.inputs["codebooks"].view(np.uint8))
    with pytest.raises(RuntimeError, match=r"linear_vq: codebooks are torch.uint8 .* expected torch.int8"):
        torch_call(unsigned)
    with pytest.raises(ValueError, match="codebooks is uint8"):
        call(unsigned)
    with pytest.raises(RuntimeError, match="x has 299 columns, the weight 300"):
        torch_call(changed(case, x=np.ascontiguousarray(case.inputs["x"][:, 1:])))


@pytest.mark.parametrize("index", [N, N + 10, -N - 1, 48])
def test_rows_outside_the_matrix_are_refused(index: int) -> None:
    """Also those that the last tile has room for."""
    case = embedding(linear(FORMATS[0], Activation.FLOAT), np.array([0, index]))
    for run in (torch_call, lambda case: onnx_call(case, True)):
        with pytest.raises(Exception, match=r"indices(\[1\] is|\) holds) -?\d+"):
            run(case)
    with pytest.raises(Exception, match="out of data bounds"):
        onnx_call(case, False)


# ---- torch and its exporter


@pytest.mark.parametrize("biased", [True, False])
def test_export_from_torch_keeps_every_input_and_attribute_in_its_place(biased: bool) -> None:
    case = linear(FORMATS[1], Activation.INT8_BLOCK)
    inputs = {i.name: case.inputs.get(i.name) for i in LINEAR.inputs} | ({} if biased else {"bias": None})

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in LINEAR.inputs[1:]:
                self.register_buffer(i.name, None if inputs[i.name] is None else torch.from_numpy(inputs[i.name]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = [getattr(self, i.name) for i in LINEAR.inputs[1:]]
            return overload("linear_vq")(x, *held, *LINEAR.values(case.attributes))

    x = torch.from_numpy(case.inputs["x"])
    program = torch.onnx.export(Module().eval(), (x,), dynamo=True, verbose=False)
    (node,) = (node for node in program.model.graph if node.op_type == "LinearVQ")
    names = [None if value is None else value.name for value in node.inputs]
    assert [name for name in names[1:] if name] == [i.name for i in LINEAR.inputs[1:] if inputs[i.name] is not None]
    assert LINEAR.read(node.attributes) == {**LINEAR.defaults, **case.attributes}
    assert attach_bodies(program.model) == {f"LinearVQ/{FORMATS[1]}_int8-block128{'_bias' * biased}": 1}
