"""Vector-quantized matrices in the op library: generic against an oracle bit for bit, every ISA against generic likewise."""

import ctypes
import itertools
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.numerics.vq import VqWeight
from qcompiler.ops import layout
from qcompiler.ops.formats import VqFormat
from tests.runtime import vq_oracle as oracle
from tests.runtime.kernel_library import KernelError, QcContext
from tests.runtime.kernel_oracle import FLOAT, INT8_BLOCK
from tests.runtime.test_kernels import BIG, ISAS, PATH, assert_same_bits, child
from tests.runtime.vq_library import QcVqWeight, VqLibrary
from tests.runtime.vq_oracle import ACTIVATIONS, CODEBOOKS, FORMS, VqForm, make_weight

pytestmark = pytest.mark.skipif(PATH is None or not PATH.exists(), reason=f"no op library: {PATH}")
LIBRARY = VqLibrary(PATH) if PATH is not None and PATH.exists() else None
GUARD = str(__file__).replace("test_vq_kernels.py", "vq_guard.py")
# The guard's shapes, as it counts its calls.
GUARDED_SHAPES = {"short": 5, "full": 84}

by_form = pytest.mark.parametrize("form", FORMS, ids=str)
by_codebook = pytest.mark.parametrize("dim, centroids", CODEBOOKS)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=["float", "block"])


def case(form: VqForm, n: int, k: int, rows: int, seed: int = 0, *, extreme: bool = False, bias: bool = True):
    rng = np.random.default_rng([seed, n, k, rows, form.dim, form.centroids, form.group])
    weight = make_weight(rng, form, n, k, extreme)
    x = rng.normal(size=(rows, k)).astype(np.float32) * rng.choice([1e-3, 1, 50], (rows, 1)).astype(np.float32)
    return weight, x, rng.normal(size=n).astype(np.float32) if bias else None


# ---- packing


@by_codebook
def test_indices_lie_like_codes_of_as_many_bits(dim, centroids):
    """Of all but 5-bit indices: field j of vector i of span b as the code of column 4·dim·b + i + 4j, over whole spans."""
    index = np.random.default_rng(1).integers(0, centroids, (19, 4 * 13))
    packed = oracle.pack_indices(index, dim, centroids)
    index_bits = centroids.bit_length() - 1
    if index_bits % dim == 0:
        bits = index_bits // dim
        column = np.arange(13 * 4 * dim)
        fields = index[:, column // (4 * dim) * 4 + column % 4] >> bits * (column % (4 * dim) // 4) & (1 << bits) - 1
        codes = layout.pack_codes(fields.astype(np.uint8), bits)
        rows = np.arange(19)  # rows and columns beyond the matrix hold what each packer likes
        assert LIBRARY.c.qc_vq_codes_bytes(19, len(column), dim, centroids) == codes.size == packed.size
        units = len(column) // layout.UNIT_K[bits]
        ours, theirs = (a.reshape(codes.shape)[rows // 16, :units].reshape(19, units, -1, 16, 4) for a in (packed, codes))
        assert units and (ours[rows, :, :, rows % 16] == theirs[rows, :, :, rows % 16]).all()


def test_five_bit_indices_by_hand():
    index = np.zeros((16, 32), np.int64)
    index[2, 4 * 5 + 1], index[2, 4 * 6 + 1], index[2, 4 * 7 + 1] = 0b10110, 0b01011, 0b11101
    index[2, 4 * 3 + 1] = 0b10001
    packed = oracle.pack_indices(index, 2, 32)
    v = [int(packed[64 * m + 9]) for m in range(5)]
    assert v == [0b110 << 5, 0b011 << 5, 0b101 << 5, 0b1 << 7 | 0b10 << 5 | 0b10001, 0b1 << 7 | 0b01 << 5]
    assert not np.delete(packed.reshape(5, 64), 9, axis=1).any()


@by_form
def test_the_oracles_matrix_is_that_of_the_format(form):
    """The numbers behind the packed tensors are what the compiler's own description of the matrix gives."""
    import torch

    weight = case(form, 37, 300, 1)[0]
    shape = (*form.blocks(37, 300), form.dim, form.centroids)
    described = VqWeight(
        torch.from_numpy(weight.index.astype(np.uint8)),
        torch.from_numpy(weight.codebooks.reshape(shape).transpose(0, 1, 3, 2).copy()),
        torch.from_numpy(weight.codebook_scales.reshape(shape[:2])),
        torch.from_numpy(weight.scales.reshape(3, -1, 16).transpose(0, 2, 1).reshape(48, -1)[:37].copy()),
        300,
        VqFormat(form.dim, form.centroids, form.block_rows, form.block_columns, form.group),
    )
    assert np.array_equal(described.factors().numpy(), weight.factors)
    assert np.array_equal(described.levels().numpy(), weight.entries)
    assert np.array_equal(described.dequantize().numpy(), weight.dense())


@by_form
def test_sizes(form):
    for n, k in itertools.product((1, 16, 17, 200), (1, 31, 64, 65, 129, 1000)):
        weight = case(form, n, k, 1)[0]
        block = form.block_rows, form.block_columns
        assert LIBRARY.c.qc_vq_codes_bytes(n, k, form.dim, form.centroids) == weight.codes.nbytes
        assert LIBRARY.c.qc_vq_codebooks_bytes(n, k, form.dim, form.centroids, *block) == weight.codebooks.nbytes
        assert LIBRARY.c.qc_vq_codebook_count(n, k, *block) == weight.codebook_scales.size
        assert LIBRARY.c.qc_scales_count(n, k, form.group) == weight.scales.size


def test_sizes_of_invalid_descriptions_are_zero():
    c = LIBRARY.c
    for n, k in ((0, 8), (8, 0), (-1, 8), (8, -1), (2**62, 2**62), (2**63 - 1, 1), (1, 2**63 - 1)):
        assert c.qc_vq_codes_bytes(n, k, 2, 16) == c.qc_vq_codebooks_bytes(n, k, 2, 16, 16, 128) == 0
    assert c.qc_vq_codes_bytes(8, 8, 2, 17) == c.qc_vq_codes_bytes(8, 8, 3, 16) == c.qc_vq_codes_bytes(8, 8, 4, 16) == 0
    for block in ((-16, 0), (8, 0), (0, 64), (0, -128)):
        assert c.qc_vq_codebook_count(8, 8, *block) == c.qc_vq_codebooks_bytes(8, 8, 2, 16, *block) == 0
    assert c.qc_vq_codebooks_bytes(8, 8, 1, 32, 16, 128) == 0


# ---- values


@by_form
@by_activation
def test_generic_is_the_oracle(form, activation):
    for seed, (n, k) in enumerate(((1, 1), (17, 3), (15, 31), (33, 65), (16, 129), (50, 300), (5, 520))):
        weight, x, bias = case(form, n, k, (1, 2, 5)[seed % 3], seed, extreme=seed % 4 == 3, bias=seed % 2 == 0)
        y = LIBRARY.linear_vq(weight, x, activation, bias, isa="generic")
        assert_same_bits(y, oracle.linear(weight, x, activation, bias), form, n, k)
        dense = weight.factors.astype(np.float64) * weight.entries
        size = np.abs(x).max(axis=1, keepdims=True) * np.abs(dense).sum(axis=1)
        bound = 1e-6 * (k + 8) if activation == FLOAT else 0.5 / 127 + 1e-5
        exact = x.astype(np.float64) @ dense.T + (0 if bias is None else bias)
        assert (np.abs(y - exact) <= bound * size + 1e-6).all(), (n, k)


def compare_isas(form, activation, shapes):
    for seed, (n, k, rows) in enumerate(shapes):
        weight, x, bias = case(form, n, k, rows, seed, extreme=seed % 5 == 4, bias=seed % 2 == 0)
        want = LIBRARY.linear_vq(weight, x, activation, bias, isa="generic")
        for isa in ISAS:
            y = LIBRARY.linear_vq(weight, x, activation, bias, isa=isa)
            assert_same_bits(y, want, form, isa, n, k, rows)


@by_form
@by_activation
def test_isas_equal_generic(form, activation):
    rows = itertools.cycle((1, 2, 3, 4, 6, 8, 12, 13, 20))
    ks = (1, 9, 31, 33, 65, 127, 129, 200, 260, 520, 1000)
    compare_isas(form, activation, [(n, k, next(rows)) for k in ks for n in (1, 17, 33)])


@pytest.mark.slow
@by_form
@by_activation
def test_isas_equal_generic_exhaustive(form, activation):
    ks = (1, 3, 4, 8, 16, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 255, 256, 257, 1000, 2048)
    compare_isas(form, activation, itertools.product((1, 15, 16, 17, 33, 130), ks, (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 25)))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(FORMS), activation=st.sampled_from(ACTIVATIONS), n=st.integers(1, 40), k=st.integers(1, 300),
    rows=st.integers(0, 14), seed=st.integers(0, 2**32 - 1), extreme=st.booleans(),
    scale=st.sampled_from([0.0, 1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e36]),
)  # fmt: skip
def test_any_shape_and_magnitude(form, activation, n, k, rows, seed, extreme, scale):
    weight, x, bias = case(form, n, k, rows, seed, extreme=extreme)
    x = (x * np.float32(scale)).astype(np.float32)
    want = LIBRARY.linear_vq(weight, x, activation, bias, isa="generic")
    if activation != FLOAT or k <= 40:
        with np.errstate(all="ignore"):
            assert_same_bits(want, oracle.linear(weight, x, activation, bias), form)
    for isa in ISAS:
        assert_same_bits(LIBRARY.linear_vq(weight, x, activation, bias, isa=isa), want, form, isa)


@by_form
def test_identity_and_embedding_give_the_weights(form):
    weight = case(form, 17, 140, 1)[0]
    assert_same_bits(LIBRARY.embedding_vq(weight, np.arange(17)), weight.dense(), "embedding")
    order = np.array([16, 0, 3, 3, 16])
    assert_same_bits(LIBRARY.embedding_vq(weight, order, threads=2), weight.dense()[order], "embedding, in this order")
    for isa in ISAS:
        y = LIBRARY.linear_vq(weight, np.eye(140, dtype=np.float32), FLOAT, isa=isa)
        assert np.array_equal(y, weight.dense().T), isa


@by_codebook
@by_activation
def test_a_row_never_depends_on_the_others(dim, centroids, activation):
    weight, x, bias = case(VqForm(dim, centroids, 32, 256, 64), 33, 270, 27)
    for isa in ISAS:
        together = LIBRARY.linear_vq(weight, x, activation, bias, isa=isa)
        alone = [LIBRARY.linear_vq(weight, x[i : i + 1], activation, bias, isa=isa) for i in range(len(x))]
        assert_same_bits(together, np.concatenate(alone), isa)


@by_codebook
@by_activation
def test_non_finite_rows_are_nan_and_stay_alone(dim, centroids, activation):
    weight, x, bias = case(VqForm(dim, centroids, 16, 128, 128), 33, 300, 7)
    clean = LIBRARY.linear_vq(weight, x, activation, bias, isa="generic")
    dirty = x.copy()
    dirty[0, 0], dirty[2, 299], dirty[3, 150], dirty[5, :] = np.nan, np.inf, -np.inf, np.nan
    bad, good = [0, 2, 3, 5], [1, 4, 6]
    for isa in ISAS:
        y = LIBRARY.linear_vq(weight, dirty, activation, bias, isa=isa)
        assert (y.view(np.uint32)[bad] == 0x7FC00000).all()
        assert_same_bits(y[good], clean[good], isa)
        for r in (0, 2):
            assert np.isnan(LIBRARY.linear_vq(weight, dirty[r : r + 1], activation, bias, isa=isa)).all()


@by_codebook
@by_activation
def test_special_activations(dim, centroids, activation):
    """Zero rows, blocks of zeros, the largest floats, subnormals, halves that round to even."""
    weight, x, bias = case(VqForm(dim, centroids, 0, 128, 0), 17, 300, 6)
    x[0] = 0
    x[1, 128:256] = 0
    x[2] = BIG * np.sign(x[2])
    x[3] = np.float32(1e-45)
    x[4] = np.round(x[4] / np.abs(x[4]).max() * 254) / 2
    x[5] = -0.0
    with np.errstate(all="ignore"):
        want = oracle.linear(weight, x, activation, bias)
    for isa in ISAS:
        y = LIBRARY.linear_vq(weight, x, activation, bias, isa=isa)
        assert_same_bits(y, want, isa)
        assert np.array_equal(y[0], bias) and np.array_equal(y[5], bias)


@by_codebook
@by_activation
def test_threads_change_no_bit(dim, centroids, activation):
    form = VqForm(dim, centroids, 32, 256, 128)
    try:
        for n, k, rows in ((3001, 700, 1), (400, 500, 5), (40, 500, 101)):
            weight, x, bias = case(form, n, k, rows)
            want = LIBRARY.linear_vq(weight, x, activation, bias)
            for threads in (2, 3, 7):
                LIBRARY.c.qc_pool_set_threads(threads)
                assert_same_bits(LIBRARY.linear_vq(weight, x, activation, bias, threads=threads), want, n, k, rows)
    finally:
        LIBRARY.c.qc_pool_set_threads(0)


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
@pytest.mark.parametrize("mode", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_no_access_beyond_any_buffer(mode):
    result = child([GUARD, str(PATH), mode])
    assert result.returncode == 0, result.stderr
    each = 2 * (1 + len(ACTIVATIONS) * len(ISAS))
    assert result.stdout.strip() == f"{len(FORMS) * GUARDED_SHAPES[mode] * each} calls"


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
@pytest.mark.parametrize("part", ["CODES", "BOOKS"])
def test_the_guard_catches_a_read_too_far(part):
    assert child([GUARD, str(PATH), "canary", part]).returncode == -11


# ---- errors


def error_of(weight, *, activation=FLOAT, rows=1, x=True, y=True, context=None, indices=None, count=None) -> str:
    values = np.zeros(1 << 12, np.float32)
    context = ctypes.addressof(context) if context else None
    weight = ctypes.addressof(weight) if weight else None
    at = values.ctypes.data
    if indices is None and count is None:
        code = LIBRARY.c.qc_linear_vq(context, weight, activation, None, rows, at if x else None, None, at if y else None)
    else:
        array = np.array(indices or [], np.int64)
        pointer = array.ctypes.data if indices else None
        code = LIBRARY.c.qc_embedding_vq(context, weight, len(array) if count is None else count, pointer, at)
    assert code != 0
    return LIBRARY.c.qc_last_error().decode()


def described(**changes) -> QcVqWeight:
    sizes = {"n": 17, "k": 40, "dim": 2, "centroids": 16, "block_rows": 16, "block_columns": 128, "group": 128}
    fields = sizes | {"codes": 4096, "codebooks": 4096, "codebook_scales": 4096, "scales": 4096} | changes
    return QcVqWeight(*fields.values())


@pytest.mark.parametrize(
    "expected, changes, call",
    [
        (["dim is 3", "1, 2 or 4"], {"dim": 3}, {}),
        (["centroids is 32", "dim 1", "4, 8 or 16"], {"dim": 1, "centroids": 32}, {}),
        (["centroids is 128", "dim 2", "16, 32, 64 or 256"], {"centroids": 128}, {}),
        (["centroids is 64", "dim 4", "expected 256"], {"dim": 4, "centroids": 64}, {}),
        (["block_rows is 24", "multiple of 16"], {"block_rows": 24}, {}),
        (["block_rows is -16", "multiple of 16, or 0"], {"block_rows": -16}, {}),
        (["block_columns is 64", "multiple of 128"], {"block_columns": 64}, {}),
        (["block_columns is -128", "multiple of 128, or 0"], {"block_columns": -128}, {}),
        (["group is 16", "32, 64, 128 or 0"], {"group": 16}, {}),
        (["n = 0 and k = 40", "at least 1"], {"n": 0}, {}),
        (["n = 17 and k = -3", "at least 1"], {"k": -3}, {}),
        (["exceeds", "expected less"], {"n": 2**61, "k": 2**61}, {}),
        (["weight.codes is null"], {"codes": None}, {}),
        (["weight.codebooks is null"], {"codebooks": None}, {}),
        (["weight.codebook_scales is null"], {"codebook_scales": None}, {}),
        (["weight.scales is null"], {"scales": None}, {}),
        (["activation is 1 (int8 per token)", "0 (float) or 2 (int8 per block)"], {}, {"activation": 1}),
        (["activation is 3 (static int8)", "0 (float) or 2 (int8 per block)"], {}, {"activation": 3}),
        (["activation is -1", "expected 0"], {}, {"activation": -1}),
        (["rows is -1", "at least 0"], {}, {"rows": -1}),
        (["x has", "fewer than 2^60"], {}, {"rows": 2**60}),
        (["x is null"], {}, {"x": False}),
        (["y is null"], {}, {"y": False}),
        (["count is -1", "at least 0"], {}, {"count": -1}),
        (["indices is null"], {}, {"count": 2}),
        (["indices[1] is 17", "n = 17"], {}, {"indices": [0, 17]}),
        (["indices[0] is -1", "n = 17"], {}, {"indices": [-1]}),
        (["context.threads is 0", "at least 1"], {}, {"context": QcContext(None, None, 0, None)}),
        (['"sse9"', "generic"], {}, {"context": QcContext(None, None, 1, b"sse9")}),
    ],
)
def test_errors_say_what_was_found_and_expected(expected, changes, call):
    text = error_of(described(**changes), **call)
    assert text.startswith(("linear_vq: ", "embedding_vq: ", "context.isa")), text
    for part in expected:
        assert part in text, text


def test_null_weight_is_an_error_and_no_rows_is_not():
    assert "weight is null" in error_of(None)
    weight = case(FORMS[0], 17, 40, 1)[0]
    for activation in ACTIVATIONS:
        assert LIBRARY.linear_vq(weight, np.zeros((0, 40), np.float32), activation).shape == (0, 17)
    assert LIBRARY.embedding_vq(weight, []).shape == (0, 40)
    with pytest.raises(KernelError):
        LIBRARY.embedding_vq(weight, [17])


def test_int8_activations_of_any_value():
    """Every product of an activation and an entry, at the corners of both ranges too."""
    form = VqForm(2, 256, 0, 0, 128)
    for extreme in (False, True):
        weight, _, _ = case(form, 16, 256, 1, extreme=extreme)
        x = np.random.default_rng(5).choice(np.float32([-127, 127]), (4, 256))
        x[0], x[1] = 127, -127
        want = oracle.linear(weight, x, INT8_BLOCK, None)
        for isa in ISAS:
            assert_same_bits(LIBRARY.linear_vq(weight, x, INT8_BLOCK, isa=isa), want, isa)
