"""Attention over a key/value cache (docs/layout.md, "Attention"): against float64, and the same bits however it is computed."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.attention_library import Attention, call, doubt, in_float64, make_attention
from tests.runtime.kernel_library import KernelError, Library
from tests.runtime.test_kernels import ISAS, PATH

pytestmark = pytest.mark.skipif(PATH is None or not PATH.exists(), reason=f"no op library: {PATH}")
LIBRARY = Library(PATH) if PATH is not None and PATH.exists() else None
GUARD = Path(__file__).with_name("attention_guard.py")
by_isa = pytest.mark.parametrize("isa", ISAS)

HEADS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 72, 80, 96, 128, 256)
PASTS = (0, 1, 15, 16, 17, 126, 127, 128, 129, 255, 256, 300)
ROWS = (1, 2, 3, 4, 5, 11, 12, 13, 31, 70)


def drawn(number: int, **said) -> Attention:
    """The shapes in turn, all else at random."""
    rng = np.random.default_rng(number)
    head = said.get("head", HEADS[number % len(HEADS)])
    rotary = int(rng.choice([0, head // 2 * 2, head // 4 * 2]))
    shape = {
        "kv_heads": int(rng.integers(1, 4)), "group": int(rng.choice([1, 2, 3, 5, 8])), "head": head,
        "past": PASTS[number % len(PASTS)], "rows": ROWS[number % len(ROWS)], "room": int(rng.choice([0, 3])),
        "rotary": rotary, "own_positions": bool(rotary and rng.integers(2)), "bias_heads": int(rng.choice([0, 0, 1])),
        "window": int(rng.choice([0, 0, 1, 7, 64, 130])), "interleaved": bool(rng.integers(2)),
        "scale": float(rng.choice([0.3, 1.0])),
    } | said  # fmt: skip
    return make_attention(rng, **shape)


def check(a: Attention, isa: str | None = None) -> np.ndarray:
    """The call against float64: outputs, new keys and values, and nothing else of the cache written."""
    expected, keys, values = in_float64(a)
    mine = a.with_own_cache()
    y = call(LIBRARY, mine, isa=isa)
    assert np.abs(y - expected).max() <= doubt(a)
    assert np.abs(mine.key[:, : a.total] - keys).max() <= 2.0**-23 * np.abs(keys).max()
    np.testing.assert_array_equal(mine.value[:, : a.total], values)
    for before, after in ((a.key, mine.key), (a.value, mine.value)):
        np.testing.assert_array_equal(after[:, : a.past], before[:, : a.past])
        assert np.isnan(after[:, a.total :]).all()
    return y


@pytest.mark.parametrize("number", range(90))
def test_against_float64_and_the_same_bits_from_every_instruction_set(number: int):
    a = drawn(number, **({"kv_heads": 1, "group": 2} if number % 3 else {}))
    y = check(a)
    for isa in ISAS[1:]:
        assert call(LIBRARY, a.with_own_cache(), isa=isa).tobytes() == y.tobytes(), isa


@pytest.mark.parametrize("number", range(24))
def test_the_same_bits_from_any_threads_and_any_cut_of_the_rows(number: int):
    past, rows = ((700, 3), (1500, 1), (100, 70), (0, 150))[number % 4]
    a = drawn(
        number, past=past, rows=rows, group=(1, 5)[number % 2], head=(64, 40)[number // 4 % 2], window=(0, 0, 200)[number % 3]
    )
    whole = a.with_own_cache()
    y = call(LIBRARY, whole)
    for threads in (2, 3, 16):
        assert call(LIBRARY, a.with_own_cache(), threads=threads).tobytes() == y.tobytes(), threads
    cut = int(np.random.default_rng(number).integers(0, rows + 1))
    parts = a.with_own_cache()
    found = [call(LIBRARY, parts.rows(*part)) for part in ((0, cut), (cut, rows)) if part[0] < part[1]]
    assert np.concatenate(found).tobytes() == y.tobytes()
    assert parts.key.tobytes() == whole.key.tobytes() and parts.value.tobytes() == whole.value.tobytes()


def test_row_by_row_is_all_rows_at_once():
    a = drawn(3, past=120, rows=20, head=72, kv_heads=2, group=4, bias_heads=8)
    one = a.with_own_cache()
    rows = [call(LIBRARY, one.rows(row, row + 1)) for row in range(20)]
    assert np.concatenate(rows).tobytes() == call(LIBRARY, a.with_own_cache(), threads=4).tobytes()


@pytest.mark.parametrize("capacity", [0, 9])
def test_a_present_elsewhere_gets_the_filled_part(capacity: int):
    a = drawn(4, past=130, rows=3, room=2)
    shared, apart = a.with_own_cache(), a.with_own_cache()
    y = call(LIBRARY, shared)
    assert call(LIBRARY, apart, elsewhere=a.total + capacity).tobytes() == y.tobytes()
    for mine, theirs, past in ((apart.key, shared.key, a.key), (apart.value, shared.value, a.value)):
        np.testing.assert_array_equal(mine[:, : a.total], theirs[:, : a.total])
        assert np.isnan(mine[:, a.total :]).all() and np.isnan(past[:, a.past :]).all()


@by_isa
def test_weights_are_exponentials_to_two_units_in_the_last_place(isa: str):
    """One query of 1, keys that are the scores, values that pick one weight: e^x / (1 + e^x) of two positions."""
    x = np.concatenate([-np.linspace(0, 86, 3000), -np.geomspace(1e-30, 1, 200)]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    found = []
    for score in x:
        new = [np.full((1, 1, 1), value, np.float32) for value in (1, 0, 0)]
        key = np.array([[[score], [0]]], np.float32)
        value = np.array([[[1], [0]]], np.float32)
        found.append(call(LIBRARY, Attention(*new, key, value, 1, scale=1.0), isa=isa).item())
    weight = expected / (1 + expected)
    assert np.abs(np.array(found) / weight - 1).max() <= 3 * 2.0**-24 + 2 * 2.0**-24


@by_isa
@pytest.mark.parametrize("rows", [1, 40])
def test_scores_of_any_size(rows: int, isa: str):
    """Large ones decide alone, and far smaller ones are 0; no overflow on the way."""
    rng = np.random.default_rng(5)
    a = make_attention(rng, past=200, rows=rows, head=24, scale=1.0)
    a.q *= 1e4
    expected, _, _ = in_float64(a)
    found = call(LIBRARY, a, isa=isa)
    assert np.isfinite(found).all()
    # a score of 1e5 has a last bit of 8e-3
    assert (np.abs(found - expected).max(-1) < 0.3).mean() > 0.9


@by_isa
@pytest.mark.parametrize("rows", [1, 30])
def test_positions_that_a_bias_forbids_count_nothing(rows: int, isa: str):
    """-inf over the whole of a block of positions, and parts of others; the same as without those positions."""
    rng = np.random.default_rng(6)
    a = make_attention(rng, past=400, rows=rows, head=16, bias_heads=1)
    a.bias[...] = 0
    a.bias[..., 100:260] = -np.inf
    y = call(LIBRARY, a.with_own_cache(), isa=isa)
    keep = np.r_[:100, 260:400]
    less = dataclasses.replace(a, key=np.concatenate([a.key[:, keep], a.key[:, 400:]], 1), past=240, bias=None)
    less.value = np.concatenate([a.value[:, keep], a.value[:, 400:]], 1)
    assert np.abs(y - in_float64(less)[0]).max() <= doubt(less)


def test_a_row_that_sees_nothing_is_not_a_number_and_no_other_is():
    a = make_attention(np.random.default_rng(7), past=150, rows=14, head=20, bias_heads=1)
    a.bias[...] = 0
    a.bias[:, 5] = -np.inf
    y = call(LIBRARY, a.with_own_cache())
    assert set(y[5].view(np.uint32).ravel()) == {0x7FC00000} and np.isfinite(np.delete(y, 5, 0)).all()
    for isa in ISAS:
        assert call(LIBRARY, a.with_own_cache(), isa=isa).tobytes() == y.tobytes()


@by_isa
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_what_comes_later_changes_nothing_before_it(name: str, isa: str):
    """A later row that is not a number, or infinite, is seen by the rows from it on only."""
    a = make_attention(np.random.default_rng(8), past=126, rows=30, head=24)
    want = call(LIBRARY, a.with_own_cache(), isa=isa)
    for bad in (np.nan, np.inf):
        getattr(a, name)[17] = bad
        y = call(LIBRARY, a.with_own_cache(), isa=isa)
        assert y[:17].tobytes() == want[:17].tobytes()
        assert not np.isfinite(y[17]).all()


def test_no_new_rows_do_nothing():
    a = make_attention(np.random.default_rng(9), rows=1)
    empty = a.rows(0, 0)
    before = empty.key.tobytes()
    assert call(LIBRARY, empty).size == 0 and empty.key.tobytes() == before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 4}, r"heads is 4 and kv_heads is 3"),
        ({"kv_heads": 0}, r"kv_heads is 0"),
        ({"head_size": 0}, r"head_size is 0, expected 1 to 4096"),
        ({"rotary": 3}, r"rotary is 3, expected an even number of at most the head size 16"),
        ({"rotary": 18}, r"rotary is 18"),
        ({"scale": float("nan")}, r"scale is nan"),
        ({"rows": -1}, r"rows is -1"),
        ({"past": -1}, r"past is -1"),
        ({"capacity": 6}, r"5 positions are filled and 2 are new, .* capacity of 6"),
        ({"past_capacity": 4}, r"5 positions are filled, expected at most the past's capacity of 4"),
        ({"past_capacity": 11}, r"capacities 11 and 10"),
        ({"q_stride": 1}, r"q_stride is 1, expected at least 48"),
        ({"v_stride": 47}, r"v_stride is 47, expected at least 48"),
        ({"rotary_rows": 6}, r"the position of row 1 is 6, expected 0 to 5"),
        ({"cosines": None}, r"cosines is null"),
        ({"present_key": None}, r"present_key is null"),
        ({"past_value": None}, r"past_value is null"),
        ({"y": 2}, r"y lies at address 0x2, expected a multiple of 4"),
        ({"bias": 4, "bias_row_stride": 6}, r"bias_row_stride is 6 .* at least the 7 positions"),
    ],
)
def test_wrong_arguments_are_named(fields: dict, message: str):
    a = make_attention(np.random.default_rng(10), kv_heads=3, group=1, past=5, rows=2, rotary=16)
    before = a.key.tobytes()
    with pytest.raises(KernelError, match=message):
        call(LIBRARY, a, **fields)
    assert a.key.tobytes() == before


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_beyond_the_tables_is_refused(position: int):
    a = make_attention(np.random.default_rng(11), past=5, rows=2, rotary=16, own_positions=True)
    a.positions[1] = position
    with pytest.raises(KernelError, match=rf"the position of row 1 is {position}, expected 0 to 8"):
        call(LIBRARY, a)


def guarded(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(GUARD), str(PATH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=GUARD.parents[2], env=None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
def test_nothing_is_touched_beyond_the_buffers():
    done = guarded()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
def test_the_guard_notices():
    assert guarded("canary").returncode < 0
