"""The edges of the linear ops (docs/layout.md, "Edges") in every instruction set: what numpy makes of the plain product."""

import ctypes
import itertools
import subprocess
import sys

import numpy as np
import pytest

from qcompiler.ops.linear_edges import Gate, finished, normalize
from tests.runtime import vq_oracle
from tests.runtime.kernel_library import Edges, KernelError, QcEdges, QcWeight
from tests.runtime.kernel_oracle import FLOAT, INT8_BLOCK, Weight, make_weight
from tests.runtime.test_kernels import GUARD, ISAS, PATH, assert_same_bits, child
from tests.runtime.vq_library import VqLibrary

pytestmark = pytest.mark.skipif(PATH is None or not PATH.exists(), reason=f"no op library: {PATH}")
LIBRARY = VqLibrary(PATH) if PATH is not None and PATH.exists() else None
by_isa = pytest.mark.parametrize("isa", ISAS)
by_gate = pytest.mark.parametrize("gate", list(Gate)[1:], ids=lambda g: g.label)
NAN = 0x7FC00000


def ulps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Floats between the two, both of one sign."""
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    return np.abs(found.view(np.int32).astype(np.int64) - expected.view(np.int32))


def gated(p: np.ndarray, q: np.ndarray, gate: Gate, isa: str, residual: np.ndarray | None = None) -> np.ndarray:
    """The gate of any two values: they come in as the bias of a weight of zeros."""
    n = 2 * p.size
    zero = Weight(
        8, 0, np.zeros((n, 1), np.int64), np.empty(0), np.empty(0),
        codes=np.zeros(n * 4, np.uint8), scales=np.zeros(n, np.float16), zeros=None,
    )  # fmt: skip
    edges = Edges(gate=int(gate), residual=residual)
    return LIBRARY.linear(zero, np.zeros((1, 1), np.float32), FLOAT, np.concatenate([p, q]), edges=edges, isa=isa)[0]


# ── The activations ──


@by_isa
@by_gate
def test_the_activation_is_the_nearest_float(gate: Gate, isa: str):
    rng = np.random.default_rng(0)
    dense = np.linspace(-20, 20, 20001, dtype=np.float32)
    wide = (np.exp2(rng.uniform(-140, 127, 8001)) * rng.choice([-1, 1], 8001)).astype(np.float32)
    p = np.concatenate([dense, wide, np.zeros(14, np.float32)])
    ones = np.ones_like(p)
    found = gated(p, ones, gate, isa)
    expected = finished(np.concatenate([p, ones]), {}, {"gate": int(gate)})
    apart = ulps(found, expected)
    subnormal = np.abs(expected) < np.finfo(np.float32).tiny  # half of these may lie in the middle of two
    assert apart[subnormal].max() <= 1 and not apart[~subnormal].any()
    assert_same_bits(found, gated(p, ones, gate, "generic"), isa)


@by_isa
@by_gate
def test_values_at_the_ends(gate: Gate, isa: str):
    inf, big = np.float32(np.inf), np.finfo(np.float32).max
    p = np.array([-inf, inf, np.nan, -2000, 0.0, -big, big, -1000, -1001, 1000, inf, 3, inf, 3, -inf, np.nan], np.float32)
    q = np.ones(16, np.float32)
    q[10], q[11], q[12], q[13], q[14] = 0, np.nan, -inf, inf, inf
    y = gated(p, q, gate, isa)
    assert y[[0, 3, 5, 7, 8]].view(np.uint32).tolist() == [0x80000000] * 5  # -0
    assert y[4:5].view(np.uint32)[0] == 0
    assert y[[1, 6, 9, 12, 13]].tolist() == [inf, big, 1000, -inf, inf]
    for at in (2, 10, 11, 14, 15):  # NaN; infinity times 0; -0 times infinity
        assert y.view(np.uint32)[at] == NAN, at


@by_isa
def test_a_residual_may_make_a_nan_of_infinities(isa: str):
    inf = np.float32(np.inf)
    p, q = np.full(16, inf), np.ones(16, np.float32)
    residual = np.full((1, 16), -inf)
    residual[0, :2] = 1, np.nan
    y = gated(p, q, Gate.SILU, isa, residual)
    assert y[0] == inf and (y.view(np.uint32)[1:] == NAN).all()


# ── The whole op ──

GATES, RESIDUALS, NORMS = tuple(Gate), (False, True), (False, True)
COMBINATIONS = [c for c in itertools.product(GATES, RESIDUALS, NORMS) if any(c)]


def around(rng: np.random.Generator, rows: int, n: int, k: int, gate: Gate, residual: bool, norm: bool) -> Edges:
    columns = n // 2 if gate else n
    return Edges(
        rng.uniform(0.5, 2, k).astype(np.float32) if norm else None,
        1e-5 if norm else 0,
        rng.standard_normal((rows, columns)).astype(np.float32) if residual else None,
        int(gate),
    )


def expect(run, x: np.ndarray, edges: Edges) -> np.ndarray:
    """The edges in numpy around a plain product; `run(x)` is that."""
    p = run(x if edges.norm is None else normalize(x, edges.norm, edges.epsilon))
    return finished(p, {"residual": edges.residual}, {"gate": edges.gate})


@pytest.mark.parametrize("gate, residual, norm", COMBINATIONS, ids=lambda v: getattr(v, "label", str(v)))
@pytest.mark.parametrize("activation", [FLOAT, INT8_BLOCK])
def test_edges_are_numpys_around_the_plain_product(gate: Gate, residual: bool, norm: bool, activation: int):
    """To the bit: what numpy rounds otherwise is one value in a million, and not among these."""
    rng = np.random.default_rng([int(gate), residual, norm])
    for n, k, rows in ((32, 33, 1), (64, 130, 3), (96, 300, 14)):
        weight = make_weight(rng, n, k, 4, 32, True)
        book = vq_oracle.make_weight(rng, vq_oracle.VqForm(2, 16, 32, 128, 64), n, k)
        x = rng.standard_normal((rows, k)).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        edges = around(rng, rows, n, k, gate, residual, norm)
        for call, matrix in ((LIBRARY.linear, weight), (LIBRARY.linear_vq, book)):
            want = expect(lambda x: call(matrix, x, activation, bias), x, edges)  # noqa: B023  called at once
            for isa in ISAS:
                assert_same_bits(call(matrix, x, activation, bias, edges=edges, isa=isa), want, isa, n, k, rows)


@pytest.mark.parametrize("gate", [Gate.NONE, Gate.SILU], ids=lambda g: g.label)
@pytest.mark.parametrize("vq", [False, True], ids=["affine", "codebooks"])
def test_threads_and_rows_change_no_bit(gate: Gate, vq: bool):
    """Pieces of tiles, pieces of rows, several sweeps; the halves of 1504 rows end within a codebook's block."""
    rng = np.random.default_rng(1)
    try:
        for n, k, rows in ((3008, 700, 1), (3008, 700, 5), (96, 500, 101), (32, 1500, 300), (32, 20000, 130)):
            if vq:
                weight = vq_oracle.make_weight(rng, vq_oracle.VqForm(2, 64, 64, 256, 32), n, k)
                call = LIBRARY.linear_vq
            else:
                weight, call = make_weight(rng, n, k, 3, 64, False), LIBRARY.linear
            x = rng.standard_normal((rows, k)).astype(np.float32)
            edges = around(rng, rows, n, k, gate, True, True)
            want = call(weight, x, INT8_BLOCK, edges=edges)
            assert_same_bits(want, expect(lambda x: call(weight, x, INT8_BLOCK), x, edges), n, k, rows)  # noqa: B023
            one = Edges(edges.norm, edges.epsilon, edges.residual[rows - 1 :], edges.gate)
            assert_same_bits(call(weight, x[rows - 1 :], INT8_BLOCK, edges=one), want[rows - 1 :], n, k, rows, "alone")
            for threads in (2, 3, 7):
                LIBRARY.c.qc_pool_set_threads(threads)
                assert_same_bits(call(weight, x, INT8_BLOCK, edges=edges, threads=threads), want, n, k, rows, threads)
    finally:
        LIBRARY.c.qc_pool_set_threads(0)


@by_isa
@pytest.mark.parametrize("activation", [FLOAT, INT8_BLOCK])
def test_non_finite_rows_are_nan_and_stay_alone(activation: int, isa: str):
    rng = np.random.default_rng(2)
    weight = make_weight(rng, 64, 300, 8, 64, False)
    x = rng.standard_normal((6, 300)).astype(np.float32)
    edges = around(rng, 6, 64, 300, Gate.SILU, True, True)
    clean = LIBRARY.linear(weight, x, activation, edges=edges, isa=isa)
    x[0, 299], x[2, 0], x[3, 150] = np.nan, np.inf, -np.inf
    y = LIBRARY.linear(weight, x, activation, edges=edges, isa=isa)
    assert (y.view(np.uint32)[[0, 2, 3]] == NAN).all()
    assert_same_bits(y[[1, 4, 5]], clean[[1, 4, 5]], isa)


@by_isa
def test_norms_at_the_ends(isa: str):
    """The largest floats, subnormal ones, and zeros, which without an epsilon are NaN."""
    weight = make_weight(np.random.default_rng(3), 16, 40, 8, 0, False)
    x = np.ones((4, 40), np.float32)
    x[0], x[1], x[2] = np.finfo(np.float32).max, 1e-38, 0
    norm = np.full(40, 0.5, np.float32)
    for epsilon in (0.0, 1e-5):
        y = LIBRARY.linear(weight, x, FLOAT, edges=Edges(norm, epsilon), isa=isa)
        plain = LIBRARY.linear(weight, normalize(x, norm, epsilon), FLOAT, isa=isa)
        assert_same_bits(y, plain, isa, epsilon)
        assert np.isnan(y[2]).all() == (epsilon == 0) and np.isfinite(y[[0, 1, 3]]).all()
        np.testing.assert_allclose(y[0], y[3], rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_no_access_beyond_any_buffer():
    result: subprocess.CompletedProcess = child([GUARD, str(PATH), "edges"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{7 * 4 * len(ISAS) * 2} calls"


# ── Errors ──


@pytest.mark.parametrize(
    "n, edges, expected",
    [
        (32, QcEdges(gate=4), "edges.gate is 4, expected 0 (none), 1 (silu), 2 (gelu_tanh) or 3 (gelu)"),
        (32, QcEdges(gate=-1), "edges.gate is -1"),
        (48, QcEdges(gate=1), "weight.n is 48 and edges.gate 1, expected two halves of a multiple of 16 rows"),
        (17, QcEdges(gate=2), "weight.n is 17 and edges.gate 2"),
        (32, QcEdges(norm=4096, epsilon=-1e-5), "edges.epsilon is -1e-05, expected a finite number of at least 0"),
        (32, QcEdges(norm=4096, epsilon=np.nan), "edges.epsilon is nan"),
        (32, QcEdges(norm=4096, epsilon=np.inf), "edges.epsilon is inf"),
        (32, QcEdges(epsilon=0.5), "edges.epsilon is 0.5 without edges.norm, expected 0"),
    ],
)
def test_errors_say_what_was_found_and_expected(n: int, edges: QcEdges, expected: str):
    weight = QcWeight(n, 40, 4, 32, 4096, 4096, None)
    at = ctypes.addressof
    code = LIBRARY.c.qc_linear_nbit(None, at(weight), FLOAT, None, at(edges), 1, 4096, None, 4096)
    with pytest.raises(KernelError) as error:
        LIBRARY.check(code)
    assert str(error.value).startswith("linear_nbit: ") and expected in str(error.value)
