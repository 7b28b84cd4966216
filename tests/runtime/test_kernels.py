"""The op library against docs/layout.md: generic against an oracle bit for bit, every ISA against generic likewise."""

import ctypes
import itertools
import os
import pathlib
import platform
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime import kernel_oracle as oracle
from tests.runtime.kernel_library import KernelError, Library, QcContext, QcRange, QcWeight, find_library
from tests.runtime.kernel_oracle import FLOAT, FORMATS, INT8_BLOCK, INT8_STATIC, INT8_TOKEN, Format, make_weight

ROOT = pathlib.Path(__file__).parents[2]
PATH = find_library()
pytestmark = pytest.mark.skipif(PATH is None or not PATH.exists(), reason=f"no op library: {PATH}")
LIBRARY = Library(PATH) if PATH is not None and PATH.exists() else None
ISAS = LIBRARY.isas if LIBRARY else ["generic"]
# All that is compiled for this architecture, whether or not this CPU executes it.
KNOWN_ISAS = {"x86_64": 6, "AMD64": 6, "aarch64": 3, "arm64": 3}.get(platform.machine(), 1)
EXERCISED: set[tuple[str, str]] = set()

N = (1, 15, 17)
K = (1, 3, 31, 33, 127, 129, 1000)
BIG = np.float32(np.finfo(np.float32).max)

by_format = pytest.mark.parametrize("form", FORMATS, ids=str)


def case(form: Format, n: int, k: int, rows: int, seed: int = 0, *, extreme: bool = False, bias: bool = True):
    rng = np.random.default_rng([seed, n, k, rows, form.bits, form.group])
    weight = make_weight(rng, n, k, form.bits, form.group, form.asymmetric, extreme)
    x = rng.normal(size=(rows, k)).astype(np.float32) * rng.choice([1e-3, 1, 50], (rows, 1)).astype(np.float32)
    return weight, x, rng.normal(size=n).astype(np.float32) if bias else None


def run(form: Format, isa: str, weight, x, bias=None, threads: int = 1) -> np.ndarray:
    EXERCISED.add((isa, str(form)))
    return LIBRARY.linear(weight, x, form.activation, bias, isa=isa, threads=threads)


def assert_same_bits(got: np.ndarray, want: np.ndarray, *what) -> None:
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan), what
    different = np.argwhere((got.view(np.uint32) != want.view(np.uint32)) & ~nan)
    assert not len(different), (*map(str, what), "first difference at", different[0].tolist())


# ── Packing ──


def test_oracle_packs_as_documented():
    """A few bytes by hand, so that kernels and oracle cannot share a misreading."""
    q = np.zeros((16, 32), np.int64)
    q[2, 5] = 7
    assert np.flatnonzero(oracle.pack_codes(q[:, :8], 8)).tolist() == [64 + 4 * 2 + 1]
    assert oracle.pack_codes(q[:, :8], 4)[4 * 2 + 1] == 7 << 4
    assert oracle.pack_codes(np.minimum(q, 3), 2)[4 * 2 + 1] == 3 << 2
    assert oracle.pack_codes(q, 3)[4 * 2 + 1] == 7 << 3  # I0, high
    q[:] = 0
    q[2, 24 + 1], q[2, 28 + 1] = 0b101, 0b011  # I3 = 0b011101: its top bits to B0, then B1, then B2
    packed = oracle.pack_codes(q, 3)
    assert [packed[64 * v + 9] >> 6 for v in range(3)] == [0b01, 0b11, 0b01]
    assert oracle.pack_zeros(np.array([[1], [2], [3], [7]] + [[0]] * 12), 3).tolist()[:2] == [0b11010001, 0b1110]


@by_format
def test_sizes(form):
    for n, k in itertools.product((1, 16, 17), K):
        weight = case(form, n, k, 1)[0]
        assert LIBRARY.c.qc_codes_bytes(n, k, form.bits) == weight.codes.nbytes
        assert LIBRARY.c.qc_scales_count(n, k, form.group) == weight.scales.size
        if form.asymmetric:
            assert LIBRARY.c.qc_zeros_bytes(n, k, form.bits, form.group) == weight.zeros.nbytes


def test_sizes_of_invalid_descriptions_are_zero():
    c = LIBRARY.c
    for n, k in ((0, 8), (8, 0), (-1, 8), (8, -1), (2**62, 2**62), (2**63 - 1, 1), (1, 2**63 - 1)):
        assert c.qc_codes_bytes(n, k, 4) == c.qc_scales_count(n, k, 32) == c.qc_zeros_bytes(n, k, 4, 32) == 0
    assert c.qc_codes_bytes(8, 8, 5) == c.qc_scales_count(8, 8, 16) == c.qc_zeros_bytes(8, 8, 4, -1) == 0


# ── Values ──


@by_format
def test_generic_is_the_oracle(form):
    for seed, (n, k) in enumerate(itertools.product(N, K)):
        if form.activation == FLOAT and k == 1000 and n != 17:
            continue  # the oracle is slow there
        weight, x, bias = case(form, n, k, (1, 2, 5)[seed % 3], seed, extreme=seed % 4 == 3, bias=seed % 2 == 0)
        y = run(form, "generic", weight, x, bias)
        assert_same_bits(y, oracle.linear(weight, x, form.activation, bias), form, n, k)
        size = np.abs(x).max(axis=1, keepdims=True) * np.abs(weight.dense()).sum(axis=1)
        bound = 1e-6 * (k + 8) if form.activation == FLOAT else 0.5 / 127 + 1e-5
        if form.activation == INT8_STATIC:  # rounded as asked for, beyond that exact
            x = oracle.STATIC_SCALE.astype(np.float64) * (oracle.static_levels(x) - oracle.STATIC_ZERO)
            size, bound = 256 * oracle.STATIC_SCALE * np.abs(weight.dense()).sum(axis=1), 1e-6 * (k / 32 + 8)
        exact = x.astype(np.float64) @ weight.dense().T + (0 if bias is None else bias)
        assert (np.abs(y - exact) <= bound * size + 1e-6).all(), (n, k)


def isa_cases(full: bool):
    if full:
        ks = (*K, 4, 5, 8, 32, 64, 128, 160, 257, 4096)
        shapes = itertools.product((1, 15, 16, 17, 33), ks, (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 25))
    else:
        rows = itertools.cycle((1, 2, 3, 4, 5, 6, 8, 12, 13))
        shapes = ((n, k, next(rows)) for k in (*K, 64, 256) for n in N)
    return [(*shape, seed % 5 == 4) for seed, shape in enumerate(shapes)]


def compare_isas(form: Format, full: bool) -> None:
    for seed, (n, k, rows, extreme) in enumerate(isa_cases(full)):
        weight, x, bias = case(form, n, k, rows, seed, extreme=extreme, bias=seed % 2 == 0)
        want = run(form, "generic", weight, x, bias)
        for isa in ISAS:
            assert_same_bits(run(form, isa, weight, x, bias), want, form, isa, n, k, rows)


@by_format
def test_isas_equal_generic(form):
    compare_isas(form, full=False)


@pytest.mark.slow
@by_format
def test_isas_equal_generic_exhaustive(form):
    compare_isas(form, full=True)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(FORMATS), n=st.integers(1, 40), k=st.integers(1, 300), rows=st.integers(1, 14),
    seed=st.integers(0, 2**32 - 1), extreme=st.booleans(),
    scale=st.sampled_from([0.0, 1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e36]),
)  # fmt: skip
def test_any_shape_and_magnitude(form, n, k, rows, seed, extreme, scale):
    weight, x, bias = case(form, n, k, rows, seed, extreme=extreme)
    x = (x * np.float32(scale)).astype(np.float32)
    want = run(form, "generic", weight, x, bias)
    if form.activation != FLOAT or k <= 40:
        with np.errstate(all="ignore"):
            assert_same_bits(want, oracle.linear(weight, x, form.activation, bias), form)
    for isa in ISAS:
        assert_same_bits(run(form, isa, weight, x, bias), want, form, isa)


@by_format
def test_identity_gives_the_weights(form):
    weight = case(form, 17, 40, 1)[0]
    dense = weight.dense().astype(np.float32)
    rows = LIBRARY.embedding(weight, np.arange(17))
    assert_same_bits(rows, dense, "embedding")
    if form.activation == FLOAT:
        for isa in ISAS:
            y = run(form, isa, weight, np.eye(40, dtype=np.float32))
            assert np.array_equal(y, dense.T)


@by_format
def test_a_row_never_depends_on_the_others(form):
    weight, x, bias = case(form, 33, 200, 27)
    for isa in ISAS:
        together = run(form, isa, weight, x, bias)
        alone = np.concatenate([run(form, isa, weight, x[i : i + 1], bias) for i in range(len(x))])
        assert_same_bits(together, alone, form, isa)


@by_format
def test_non_finite_rows_are_nan_and_stay_alone(form):
    weight, x, bias = case(form, 33, 300, 7)
    clean = run(form, "generic", weight, x, bias)
    dirty = x.copy()
    dirty[0, 0], dirty[2, 299], dirty[3, 150], dirty[5, :] = np.nan, np.inf, -np.inf, np.nan
    bad = [0, 2, 3, 5]
    for isa in ISAS:
        y = run(form, isa, weight, dirty, bias)
        assert np.isnan(y[bad]).all()
        good = [r for r in range(7) if r not in bad]
        assert_same_bits(y[good], clean[good], form, isa)
        assert (y.view(np.uint32)[bad] == 0x7FC00000).all()
        for r in (0, 2):
            assert np.isnan(run(form, isa, weight, dirty[r : r + 1], bias)).all()


@by_format
def test_special_activations(form):
    """Zero rows, blocks of zeros, the largest floats, subnormals, halves that round to even."""
    weight, x, bias = case(form, 17, 300, 6)
    x[0] = 0
    x[1, 128:256] = 0
    x[2] = BIG * np.sign(x[2])
    x[3] = np.float32(1e-45)
    x[4] = np.round(x[4] / np.abs(x[4]).max() * 254) / 2
    x[5] = -0.0
    with np.errstate(all="ignore"):
        want = oracle.linear(weight, x, form.activation, bias)
    for isa in ISAS:
        y = run(form, isa, weight, x, bias)
        assert_same_bits(y, want, form, isa)
        assert np.array_equal(y[0], bias) and np.array_equal(y[5], bias)


@pytest.mark.parametrize("activation", [INT8_TOKEN, INT8_STATIC])
def test_longest_exact_rows(activation):
    """The largest k for which a whole row's integer sum fits int32, at its largest magnitude."""
    form = Format(8, 0, True, activation)
    k = (2**31 - 1) // ((128 if activation == INT8_STATIC else 127) * 255)
    q, zero = np.full((2, k), 127), np.full((2, 1), -128)
    q[1], zero[1] = -128, 127
    scale = np.full((2, 1), 0.01, np.float16)
    scales = np.zeros(16, np.float16)
    scales[:2] = 0.01
    weight = oracle.Weight(8, 0, q, scale, zero, oracle.pack_codes(q, 8), scales, oracle.pack_zeros(zero, 8))
    # static: -128, and the sign of the sums turned
    x = np.full((2, k), -1000 if activation == INT8_STATIC else 1, np.float32)
    want = oracle.linear(weight, x, activation, None)
    assert min(want[0]) < 0 < max(want[0])
    for isa in ISAS:
        assert_same_bits(run(form, isa, weight, x), want, isa)
    longer = QcWeight(2, k + 1, 8, 0, weight.codes.ctypes.data, scales.ctypes.data, weight.zeros.ctypes.data)
    zero, offset = np.array([-37], np.int8), np.zeros(2, np.float32)
    range_ = QcRange(1, zero.ctypes.data, offset.ctypes.data) if activation == INT8_STATIC else None
    text = error_of(longer, activation=activation, range_=range_)
    assert f"k is {k + 1}" in text and f"k <= {k}" in text


# ── Threads ──


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("bits", oracle.BITS)
def test_threads_change_no_bit(bits, activation):
    form = Format(bits, 64, bits == 4, activation)
    try:
        for n, k, rows in ((3001, 1500, 1), (2000, 700, 5), (40, 500, 101), (16, 3000, 300)):
            weight, x, bias = case(form, n, k, rows)
            want = run(form, ISAS[0], weight, x, bias)
            for threads in (2, 3, 7):
                LIBRARY.c.qc_pool_set_threads(threads)
                assert_same_bits(run(form, ISAS[0], weight, x, bias, threads), want, n, k, rows, threads)
    finally:
        LIBRARY.c.qc_pool_set_threads(0)


def test_several_callers_at_once():
    form = Format(4, 32, False, INT8_BLOCK)
    cases = [case(form, 2000 + 16 * i, 700, 1 + i) for i in range(6)]
    want = [run(form, "generic", *c) for c in cases]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if run(form, ISAS[0], *cases[i], threads=2 + i % 2).tobytes() != want[i].tobytes():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_pool_works_in_a_forked_child():
    code = """
import os, numpy as np
from tests.runtime.kernel_library import Library, find_library
from tests.runtime.kernel_oracle import make_weight
library = Library(find_library())
weight = make_weight(np.random.default_rng(0), 3000, 1000, 4, 32, False)
x = np.ones((1, 1000), np.float32)
want = library.linear(weight, x, 2, threads=2).tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if all(library.linear(weight, x, 2, threads=2).tobytes() == want for _ in range(5)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    child(["-c", code], check=True)


# ── Memory ──


def child(arguments: list[str], **options) -> subprocess.CompletedProcess:
    extra = options.pop("env", {})
    env = dict(os.environ, QCOMPILER_LIBRARY=str(PATH), PYTHONPATH=str(ROOT), **extra)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, **options)


GUARD = str(pathlib.Path(__file__).with_name("kernel_guard.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
@pytest.mark.parametrize("mode", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_no_access_beyond_any_buffer(mode):
    result = child([GUARD, str(PATH), mode])
    assert result.returncode == 0, result.stderr
    shapes = 250 if mode == "full" else 7
    assert result.stdout.strip() == f"{len(FORMATS) * shapes * len(ISAS) * 6} calls"


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_the_guard_catches_a_read_too_far():
    assert child([GUARD, str(PATH), "canary"]).returncode == -11


# ── Errors ──


def error_of(
    weight, *, activation=FLOAT, range_=None, rows=1, x=True, y=True, context=None, indices=None
) -> str:
    values = np.zeros(1 << 18, np.float32)
    address = values.ctypes.data
    context = ctypes.addressof(context) if context else None
    weight = ctypes.addressof(weight) if weight else None
    if indices is None:
        x, y = (address if given else None for given in (x, y))
        range_ = ctypes.addressof(range_) if range_ else None
        code = LIBRARY.c.qc_linear_nbit(context, weight, activation, range_, None, rows, x, None, y)
    else:
        array = np.array(indices, np.int64)
        code = LIBRARY.c.qc_embedding_nbit(context, weight, len(indices), array.ctypes.data, address)
    assert code != 0
    return LIBRARY.c.qc_last_error().decode()


def described(**changes) -> QcWeight:
    fields = {"n": 17, "k": 40, "bits": 4, "group": 32, "codes": 4096, "scales": 4096, "zeros": None} | changes
    return QcWeight(*fields.values())


@pytest.mark.parametrize(
    "expected, changes, call",
    [
        (["bits is 5", "8, 4, 3 or 2"], {"bits": 5}, {}),
        (["group is 16", "32, 64, 128 or 0"], {"group": 16}, {}),
        (["n = 0 and k = 40", "at least 1"], {"n": 0}, {}),
        (["n = 17 and k = -3", "at least 1"], {"k": -3}, {}),
        (["exceeds", "expected less"], {"n": 2**61, "k": 2**61}, {}),
        (["weight.codes is null"], {"codes": None}, {}),
        (["weight.scales is null"], {"scales": None}, {}),
        (["activation is 4", "0 (float)", "3 (static int8)"], {}, {"activation": 4}),
        (["range (of static int8 activations) is null"], {}, {"activation": INT8_STATIC}),
        (["a static range is given and activation is 1", "expected 3"], {}, {"activation": 1, "range_": QcRange(1, None, None)}),
        (["range.scale is 0", "above 0"], {}, {"activation": INT8_STATIC, "range_": QcRange(0, None, None)}),
        (["range.scale is inf", "finite"], {}, {"activation": INT8_STATIC, "range_": QcRange(np.inf, None, None)}),
        (["range.scale is nan", "finite"], {}, {"activation": INT8_STATIC, "range_": QcRange(np.nan, None, None)}),
        (["range.zero is given without range.offset"], {}, {"activation": INT8_STATIC, "range_": QcRange(1, 4096, None)}),
        (["range.offset is given without range.zero"], {}, {"activation": INT8_STATIC, "range_": QcRange(1, None, 4096)}),
        (["rows is -1", "at least 0"], {}, {"rows": -1}),
        (["x has", "fewer than 2^60"], {}, {"rows": 2**60}),
        (["x is null"], {}, {"x": False}),
        (["y is null"], {}, {"y": False}),
        (["indices[1] is 17", "n = 17"], {}, {"indices": [0, 17]}),
        (["indices[0] is -1", "n = 17"], {}, {"indices": [-1]}),
        (["context.threads is 0", "at least 1"], {}, {"context": QcContext(None, None, 0, None)}),
        (['"sse9"', "generic"], {}, {"context": QcContext(None, None, 1, b"sse9")}),
    ],
)
def test_errors_say_what_was_found_and_expected(expected, changes, call):
    text = error_of(described(**changes), **call)
    assert text.startswith(("linear_nbit: ", "embedding_nbit: ", "context.isa")), text
    for part in expected:
        assert part in text


def test_null_weight_is_an_error_and_no_rows_is_not():
    assert "weight is null" in error_of(None)
    weight = case(FORMATS[0], 17, 40, 1)[0]
    assert LIBRARY.linear(weight, np.zeros((0, 40), np.float32), FLOAT).shape == (0, 17)
    assert LIBRARY.embedding(weight, []).shape == (0, 40)
    with pytest.raises(KernelError):
        LIBRARY.embedding(weight, [17])


@pytest.mark.parametrize("name", ["generic", "nothing"])
def test_isa_from_the_environment(name):
    code = """
import numpy as np
from tests.runtime.kernel_library import KernelError, Library, find_library
from tests.runtime.kernel_oracle import make_weight
library = Library(find_library())
print(library.c.qc_isa().decode())
weight = make_weight(np.random.default_rng(0), 3, 4, 4, 32, False)
try:
    library.linear(weight, np.ones((1, 4), np.float32), 0)
except KernelError as error:
    print(error)
"""
    lines = child(["-c", code], check=True, env={"QCOMPILER_ISA": name}).stdout.splitlines()
    if name == "generic":
        assert lines == ["generic"]
    else:
        assert lines[0] == "" and 'QCOMPILER_ISA is "nothing", expected' in lines[1] and "generic" in lines[1]


def test_all_kernels_are_exercised(capsys):
    """What runs of all that is compiled in. A CPU without AVX-512 shows here, and nowhere else."""
    for form in FORMATS:
        for isa in ISAS:
            arguments = case(form, 17, 130, 3)
            assert_same_bits(run(form, isa, *arguments), run(form, "generic", *arguments), form, isa)
    with capsys.disabled():
        print(f"\n{len(EXERCISED)} of {KNOWN_ISAS * len(FORMATS)} kernels exercised ({', '.join(ISAS)})")
    assert len(EXERCISED) == len(ISAS) * len(FORMATS)
