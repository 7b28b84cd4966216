"""tools/bench/kernels: bytes and places of our weights, shares and ratios, goals, a tiny run, what is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler.errors import InputError
from qcompiler.ops.packing import packed_bytes_of
from qcompiler.report import tables
from qcompiler.runtime import library
from tools.bench import kernel_peers, kernels, kernels_goals, kernels_limit, kernels_ours, kernels_report
from tools.bench.kernels_ours import FORMATS, REGIONS
from tools.bench.kernels_side import TOLERANCE, Case, Opened, Skipped, relative_error


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_that_the_format_stores(name: str) -> None:
    stored = kernels_ours.tensors(80, 384, FORMATS[name])
    assert sum(stored.values()) == sum(packed_bytes_of(80, 384, FORMATS[name]).values())


def test_bits_per_weight_are_those_of_the_layout() -> None:
    found = {name: round(8 * sum(kernels_ours.tensors(4096, 4096, f).values()) / 4096**2, 3) for name, f in FORMATS.items()}
    assert found["int8"] == 8.004 and found["int4-g32"] == 4.5 and found["int2-g128"] == 2.125
    assert (found["vq2"], found["vq2.5"], found["vq3"], found["vq4"]) == (2.258, 2.754, 3.252, 4.25)
    assert (found["vq1d-2"], found["vq2-4d"], found["nf4"]) == (2.148, 2.254, 4.25)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (1024, 2048)])
def test_matrices_lie_one_after_another_and_aligned(name: str, n: int, k: int) -> None:
    places, ends = kernels_ours.place(n, k, FORMATS[name], 3)
    sizes = kernels_ours.tensors(n, k, FORMATS[name])
    for region in set(REGIONS.values()):
        parts = sorted((p[t], sizes[t]) for p in places for t in sizes if REGIONS[t] == region)
        for (begin, size), (following, _) in itertools.pairwise(parts):
            assert begin + size <= following < begin + size + 65536
        assert ends[region] == (sum(parts[-1]) if parts else 0)
    for tensor, size in sizes.items():
        step = 65536 if size >= 2**20 else 64
        assert all(place[tensor] % step == 0 for place in places)


def test_a_walk_reads_as_many_matrices_as_make_up_the_bytes() -> None:
    case = Case(64, 256, 1, 1, 10_000)
    assert [case.count(size) for size in (1, 9_999, 10_000, 10_001)] == [10_000, 2, 1, 1]
    assert Case(64, 256, 128, 1, 10_000, matrices=2).count(1) == 2


def sides() -> dict:
    """Walks a second of two rounds; matrices of 4 x 8 weights."""
    return {
        "int4-g32": {"family": "ours", "matrices": 2, "matrix_bytes": 16, "error": 0.0, "walks": [10.0, 20.0]},
        "vq2": {"family": "ours", "matrices": 4, "matrix_bytes": 8, "error": 0.0, "walks": [10.0, 5.0]},
        "ort-int4-b32": {"family": "onnxruntime", "matrices": 2, "matrix_bytes": 20, "error": 0.0, "walks": [5.0, 40.0]},
    }


def setting(rows: int = 1, threads: int = 2) -> dict:
    reads = [{"a": 1000.0, "b": 900.0}, {"a": 500.0, "b": 800.0}]
    return kernels_report.setting(Case(4, 8, rows, threads, 1), sides(), reads, [6400.0, 12800.0], "dot")


def test_shares_and_ratios_are_within_a_round() -> None:
    found = setting()
    assert found["limits"]["read"]["loop"] == "b"  # medians 750 and 850: not the one with the best single figure
    four, two = found["sides"]["int4-g32"], found["sides"]["vq2"]
    assert four["bits_per_weight"] == 4 and four["bytes_per_second"]["samples"] == [320, 640]
    assert four["weights_per_second"]["samples"] == [640, 1280]
    assert four["operations_per_second"]["samples"] == [1280, 2560]
    assert four["share_of_read"]["samples"] == [320 / 900, 640 / 800]
    assert four["share_of_compute"]["samples"] == [0.2, 0.2]
    assert two["ratios"]["int4-g32"]["median"] == np.median([2, 0.5])
    assert four["ratios"]["ort-int4-b32"]["median"] == np.median([2, 0.5])
    assert "int4-g32" not in four["ratios"] and "vq2" not in four["ratios"]  # ratios are to peers and to one of ours


def test_without_known_instructions_there_is_no_share_of_compute() -> None:
    found = kernels_report.setting(Case(4, 8, 1, 1, 1), sides(), [{"a": 1.0}] * 2, [0.0, 0.0], "")
    assert found["limits"]["compute"] is None and found["sides"]["vq2"]["share_of_compute"] is None
    assert kernels_report.table(found).rows[0][6] is None


def results(**changes: object) -> dict:
    return {
        "shape": [4, 8], "megabytes": 256, "resident": False, "rounds": 2, "slice": 0.1, "load_before": 0.0,
        "skipped": {"x": "why", "y": "why"}, "settings": [setting()],
    } | changes  # fmt: skip


def shown(found: dict) -> str:
    stream = io.StringIO()
    tables.show(kernels_report.document(found, []), stream=stream)
    return " ".join(stream.getvalue().split())


def test_the_report_names_goals_peers_and_what_was_skipped() -> None:
    text = shown(results())
    assert "skipped: x, y: why" in text
    assert "weights a second, median ratios to onnxruntime" in text
    assert "goals: 0 of 5 reached" in text  # two shares of the read limit, three ratios
    assert "goals" not in shown(results(resident=True))
    assert "BUSY MACHINE" not in text and "BUSY MACHINE" in shown(results(load_before=1000.0))


def test_goals_count_only_where_they_were_measured() -> None:
    names = [(goal.text, threads) for goal, threads, _ in kernels_goals.found([setting()])]
    assert ("vq2 / int4-g32", 2) in names and ("vq2 / read limit", 2) in names
    assert not list(kernels_goals.found([setting(threads=7)]))  # no goal of one row is for seven threads
    prefill = [goal.text for goal, _, _ in kernels_goals.found([setting(rows=512, threads=7)])]
    assert "int4-g32 / ort-int4-b32" in prefill and "int4-g32 / compute limit" in prefill
    found = {goal.text: spread["median"] >= goal.least for goal, _, spread in kernels_goals.found([setting()])}
    assert found["vq2 / int4-g32"] is (1.25 >= 1.75)


def test_every_goal_names_sides_that_there_are() -> None:
    known = set(FORMATS) | {side.name for side in kernel_peers.sides("all")}
    for goal in kernels_goals.GOALS:
        assert goal.side in FORMATS and goal.against in known | set(kernels_goals.SHARES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


TINY = "--shape 64x256 --megabytes 0.02 --rounds 1 --slice 0.001 --threads 1,2".split()


def test_a_tiny_run_measures_every_format(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    files = {"--json": tmp_path / "k.json", "--csv": tmp_path / "k.csv"}
    more = ["--rows", "1,17", "--peers", "none", *(str(part) for pair in files.items() for part in pair)]
    assert kernels.main([*TINY, *more]) == 0
    found = json.loads(files["--json"].read_text())
    assert found["report"] == "bench-kernels" and found["skipped"] == {}
    assert [(s["threads"], s["rows"]) for s in found["settings"]] == [(1, 1), (1, 17), (2, 1), (2, 17)]
    for one in found["settings"]:
        assert list(one["sides"]) == list(FORMATS)
        for side in one["sides"].values():
            assert side["error"] <= TOLERANCE and side["weights_per_second"]["median"] > 0
            assert one["rows"] == 1 or side["matrices"] == kernels.PREFILL_MATRICES
        assert one["limits"]["read"]["bytes_per_second"]["median"] > 0
    lines = list(csv.DictReader(files["--csv"].open()))
    assert len(lines) == 4 * len(FORMATS) and lines[1]["ratio to int4-g32"] == ""
    assert "1 thread, 1 row; limits: read" in capsys.readouterr().out


def test_kinds_of_activations_and_instruction_sets_are_sides(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    more = "--rows 1 --threads 1 --peers none --formats int8,vq2 --activations float,int8-token --isas all".split()
    found = kernels.run(kernels.options([*TINY, *more]))
    isas = library.isas()
    expected = [f"{kind} {isa}" for kind in ("int8 float", "int8 int8-token", "vq2 float") for isa in isas]
    assert list(found["settings"][0]["sides"]) == expected
    assert list(found["skipped"]) == [f"vq2 int8-token {isa}" for isa in isas]
    assert all("scale per 128 inputs" in reason for reason in found["skipped"].values())


class Wrong:
    """A peer that multiplies with other weights than it says."""

    name, family = "wrong", "test"

    def open(self, case: Case) -> Opened:
        ones = np.ones((case.rows, case.n), np.float32)
        return Opened(lambda: None, 1, 1, lambda: (ones, -ones))


class Missing:
    name, family = "missing", "test"

    def open(self, case: Case) -> Opened:
        raise Skipped("not installed: nothing")


def test_a_wrong_product_and_a_missing_program_are_skipped_with_a_word(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(kernel_peers, "sides", lambda _: [Wrong(), Missing()])
    found = kernels.run(kernels.options([*TINY, "--rows", "1", "--threads", "1", "--formats", "int8"]))
    assert list(found["settings"][0]["sides"]) == ["int8"]
    assert found["skipped"]["missing"] == "not installed: nothing"
    assert found["skipped"]["wrong"].startswith("its product is off by 2 of the float product")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--peers", "tvm"], "unknown peer 'tvm'"),
        (["--isas", "mmx"], "unknown instruction set 'mmx'"),
        (["--activations", "int4"], "unknown kind of activations 'int4'"),
        (["--rows", "0"], "--rows is '0'"),
        (["--shape", "64"], "--shape is '64'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--formats", "none", "--peers", "none"], "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([*TINY, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_limits_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_limit.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"g\+\+ or clang\+\+, or set CXX"):
        kernels_limit.built()


def test_a_result_that_is_not_finite_is_wrong() -> None:
    one = np.ones((1, 4), np.float32)
    assert relative_error(one, one) == 0
    assert relative_error(np.full_like(one, np.nan), one) == relative_error(one[:, :2], one) == float("inf")
