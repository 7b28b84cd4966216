"""tools/bench/gpu: bytes of the weights, candidates, the dispatch table made of figures, the report, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.ops.formats import Activation, AffineFormat, VqFormat
from qcompiler.ops.packing import packed_bytes_of
from qcompiler.report import tables
from tests.runtime.fake_gpu import fake_gpus
from tools.bench import artifacts, command, gpu, gpu_compile, gpu_dispatch, gpu_goals, gpu_peers, gpu_report, gpu_timing
from tools.bench.gpu_ours import FORMATS, Choice, Ours, activation_of, dequantized, packed
from tools.bench.gpu_side import TOLERANCE, GpuCase, Skipped

CPU = torch.device("cpu")


def case(n: int = 80, k: int = 384, rows: int = 3) -> GpuCase:
    return GpuCase(n, k, rows, CPU)


# ---- sides


@pytest.mark.parametrize("name", FORMATS)
def test_our_weights_are_as_they_are_stored(name: str) -> None:
    tensors = packed(case(), FORMATS[name])
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size == sum(packed_bytes_of(80, 384, FORMATS[name]).values())


@pytest.mark.parametrize("name", ["int8", "int4-g32", "vq3", "vq2-4d", "nf4"])
def test_the_product_is_checked_against_the_weights_own_numbers(name: str) -> None:
    """The op on the CPU multiplies with the rows that the check dequantizes."""
    from qcompiler.ops import SPECS
    from qcompiler.ops.torch_ops import overload

    side, where = Ours(name), case(n=144)
    spec, tensors = SPECS[side.op], packed(where, FORMATS[name])
    x = where.x(torch.float32)
    inputs = (x if i.name == "x" else tensors.get(i.name) for i in spec.inputs)
    y = overload(side.op)(*inputs, *spec.values(side.attributes(where)))
    expected = x.numpy() @ dequantized(where, FORMATS[name], tensors).T
    assert expected.shape == (3, 128)  # some rows are enough
    np.testing.assert_allclose(y.numpy()[:, :128], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("name,kind", [("int4-g128", "float"), ("vq3", "int8")])
def test_our_sides_run_the_kernel_that_they_name(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, in place of the op that a GPU has: a product that is right, as often as there are matrices."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    from qcompiler.gpu import implementation
    from qcompiler.ops import torch_ops

    monkeypatch.setattr(torch_ops, "overload", implementation)
    opened = Ours(name, kind, torch.float16, TILES).open(case(16, 128), lambda size: 2)
    assert len(opened.calls) == 2 and opened.error() < TOLERANCE
    assert opened.about == {"kernel": "dot", "config": TILES.config}
    assert Ours(name, kind).open(case(16, 128), lambda size: 1).about["kernel"] in ("gemv", "dot")
    with pytest.raises(Skipped, match="names kernel 'rows', which does not compute"):
        gpu.measure(Ours(name, kind, choice=Choice("rows", {"block_k": 512, "warps": 4})), case(16, 128), 2)


def test_int8_activations_have_the_scales_that_a_format_takes() -> None:
    assert activation_of("int8", AffineFormat(8, 0)) is Activation.INT8_TOKEN
    assert activation_of("int8", AffineFormat(4, 128)) is Activation.INT8_BLOCK
    assert activation_of("int8", VqFormat(2, 64, 32, 256, 128)) is Activation.INT8_BLOCK
    assert activation_of("float", VqFormat(2, 64, 32, 256, 128)) is Activation.FLOAT


def test_names_of_our_sides_tell_them_apart() -> None:
    chosen = gpu.options(["--formats", "vq3,int8", "--dtypes", "float16,bfloat16"])
    names = [side.name for side in gpu.ours(chosen)]
    assert names[:4] == ["vq3", "vq3 bf16", "vq3 int8", "vq3 int8 bf16"] and len(set(names)) == 8
    assert gpu.ours(gpu.options(["--formats", "none"])) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float_side_multiplies_with_a_matrix_of_its_own_each_time(dtype: torch.dtype) -> None:
    opened = gpu_peers.Float(dtype).open(case(), lambda size: 3)
    assert opened.matrix_bytes == 2 * 80 * 384 and len(opened.calls) == 3
    assert opened.error() < TOLERANCE
    assert all(torch.equal(call(), opened.calls[0]()) for call in opened.calls)


def test_weights_in_a_graph_are_more_than_a_cache_holds() -> None:
    for size in (1, 1000, 4096 * 4096 // 2, gpu_timing.COLD_BYTES, 10**9):
        assert gpu_timing.copies(size) * size >= gpu_timing.COLD_BYTES > (gpu_timing.copies(size) - 1) * size
        assert gpu_timing.copies(size, 2**30) * size >= 2**30 > (gpu_timing.copies(size, 2**30) - 1) * size


def test_a_large_cache_takes_more_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=126 * 2**20))
    assert gpu_timing.cold_bytes(torch.device("cuda", 0)) == 504 * 2**20 and gpu_timing.cold_bytes(CPU) == 256 * 2**20


@pytest.mark.parametrize("side", [gpu_peers.BitsAndBytes(), gpu_peers.GemLite()])
def test_peers_that_are_not_installed_are_skipped_with_a_word(side, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(gpu_peers.importlib, "import_module", missing)
    with pytest.raises(Skipped, match=f"not installed: {side.family}"):
        gpu.measure(side, case(), 2)


def test_what_does_not_fit_a_peer_is_skipped_with_a_word() -> None:
    with pytest.raises(Skipped, match="more than 16 rows"):
        gpu.measure(gpu_peers.TorchIntMm(), case(), 2)
    with pytest.raises(Skipped, match="on a GPU only"):
        gpu.measure(gpu_peers.TorchInt4(32), case(), 2)
    with pytest.raises(Skipped, match="multiple of 128, found 100"):
        gpu_peers.codes_and_scales(case(k=100), 128)


def test_a_wrong_product_is_not_measured() -> None:
    opened = SimpleNamespace(calls=[], matrix_bytes=1, about={})
    with pytest.raises(Skipped, match=r"off by 0\.5 of the float product"):
        gpu._checked(opened, 0.5, 2)
    with pytest.raises(Skipped, match="off by nan"):
        gpu._checked(opened, float("nan"), 2)


def test_an_error_of_another_program_does_not_end_the_run() -> None:
    class Broken:
        name = family = "broken"

        def open(self, case, matrices):
            raise AttributeError("no such kernel\nand more")

    with pytest.raises(Skipped, match=r"^AttributeError: no such kernel$"):
        gpu.measure(Broken(), case(), 2)


def test_peers_are_chosen_by_program_or_side() -> None:
    assert [side.name for side in gpu_peers.sides("none")] == ["float16", "bfloat16"]
    assert [side.name for side in gpu_peers.sides("gemlite,torch-int4-g32")][2:] == ["gemlite-int4-g128", "torch-int4-g32"]
    with pytest.raises(UsageError, match="unknown peer 'x'; known: none, all, torch"):
        gpu_peers.sides("x")


# ---- candidates and the table made of what was measured


@pytest.mark.parametrize("search", [gpu_dispatch.FEW, gpu_dispatch.ALL])
@pytest.mark.parametrize("name", ["int8", "int4-g128", "vq2"])
def test_every_candidate_is_a_rule_of_a_dispatch_table(name: str, search: str) -> None:
    pytest.importorskip("triton")
    from qcompiler.gpu import dispatch

    for kind in ("float", "int8"):
        for rows in (1, 4, 16, 64, 256, 4096):
            found = gpu_dispatch.candidates(Ours(name, kind), rows, search)
            assert len({choice.text for choice in found}) == len(found) > 1
            rules = [{"kernel": choice.kernel, "config": dict(choice.config)} for choice in found]
            assert len(dispatch.parse({"schema": 1, "devices": {"generic": rules}}, "")["generic"]) == len(found)


def test_integer_products_are_tried_where_a_whole_row_has_one_scale() -> None:
    kernels = lambda name, kind: {c.kernel for c in gpu_dispatch.candidates(Ours(name, kind), 256, "few")}  # noqa: E731
    assert "int_mm" in kernels("int8", "int8")
    assert "int_mm" not in kernels("int8", "float") | kernels("int4-g128", "int8") | kernels("vq3", "int8")
    assert "dot_gather" in kernels("vq3", "float") and "dot_gather" not in kernels("int8", "float")


SMALL = Choice("gemv", {"block_n": 32, "block_k": 64, "split": 0, "warps": 1, "stages": 2})
TILES = Choice("dot", {"block_m": 16, "block_n": 64, "block_k": 128, "split": 0, "warps": 4, "stages": 1})
WHOLE = Choice("matmul", {"chunk": 0})


def seconds(median: float) -> dict:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "samples": [median]}


def side(choice: Choice | None, median: float, size: int = 1000, name: str = "int4-g128") -> dict:
    found = {"family": "ours" if choice else "float", "matrix_bytes": size, "matrices": 3, "error": 0.001}
    found["seconds"] = seconds(median)
    if choice:
        found |= {"op": "linear_nbit", "format": FORMATS[name].label, "activation": "float"}
        found |= {"kernel": choice.kernel, "config": dict(choice.config)}
    return found


def results(figures: dict[tuple[int, int, int], Choice]) -> dict:
    copy = {"median": 2e9, "p20": 1e9, "p80": 3e9, "samples": []}
    settings = [
        gpu_report.setting(n, k, rows, {"float16": side(None, 4e-6, 4000), "int4-g128": side(choice, 2e-6)}, copy)
        for (n, k, rows), choice in figures.items()
    ]
    machine = {
        "device": "Some GPU", "capability": "9.0", "driver": "1.2", "ecc": "Enabled", "clocks": {"current.sm": "10 MHz"},
        "torch": "2", "cuda": "12", "triton": "3", "commit": "0123456789ab", "changed": False,
    }  # fmt: skip
    return {"machine": machine, "copy": copy, "cold_bytes": 2**28, "replays": 5, "search": "few", "skipped": {"x": "why"},
            "unmeasured": [], "settings": settings}  # fmt: skip


def test_a_proposed_table_takes_what_was_fastest_where_it_was_measured() -> None:
    pytest.importorskip("triton")
    from qcompiler.gpu import dispatch

    figures = {(4096, 4096, 1): SMALL, (4096, 4096, 4): TILES, (4096, 4096, 16): TILES, (4096, 4096, 256): WHOLE,
               (4096, 14336, 1): TILES, (4096, 14336, 256): WHOLE, (16384, 16384, 1): SMALL}  # fmt: skip
    proposed = json.loads(json.dumps(gpu_dispatch.proposed(results(figures))))
    rules = dispatch.parse(proposed, "proposed")["Some GPU"]

    def kernel(n: int, k: int, rows: int) -> str | None:
        names = {"op": "linear_nbit", "format": FORMATS["int4-g128"].label, "activation": "float", "dtype": "bfloat16"}
        found = [r for r in rules if r.fits(names, {"rows": rows, "outputs": n, "inputs": k})]
        return found[0].kernel if found else None

    for (n, k, rows), choice in figures.items():
        assert kernel(n, k, rows) == choice.kernel, (n, k, rows)
    assert [kernel(4096, 4096, rows) for rows in (0, 2, 5, 17, 10**6)] == ["gemv", "dot", "dot", "matmul", "matmul"]
    assert kernel(4096, 8192, 1) == kernel(1000, 1000, 1) == kernel(8191, 4096, 1) == "gemv"  # as 4096 x 4096
    assert kernel(8193, 4096, 256) == "gemv"  # nearer to 16384, where one row alone was measured
    assert len(rules) == 3 + 2 + 1


def test_a_table_names_only_what_was_measured() -> None:
    proposed = gpu_dispatch.proposed(results({(64, 64, 1): SMALL}))
    (rule,) = proposed["devices"]["Some GPU"]
    conditions = {"op": "linear_nbit", "format": FORMATS["int4-g128"].label, "activation": "float", "rows": [0, None]}
    assert rule == {**conditions, "dtype": ["float16", "bfloat16"], "kernel": "gemv", "config": dict(SMALL.config)}


# ---- the report


def test_rates_are_of_the_stored_bytes_and_ratios_of_medians() -> None:
    found = results({(4096, 4096, 1): SMALL})["settings"][0]["sides"]
    assert found["int4-g128"]["bytes_per_second"] == 1000 / 2e-6 and found["int4-g128"]["share_of_copy"] == 0.25
    assert found["int4-g128"]["ratios"] == {"float16": 2.0} and found["float16"]["ratios"] == {}


def shown(found: dict) -> str:
    stream = io.StringIO()
    tables.show(gpu_report.document(found, ["--rows", "1"]), stream=stream)
    return " ".join(stream.getvalue().split())


def test_the_report_states_the_machine_the_method_and_what_was_skipped() -> None:
    text = shown(results({(4096, 4096, 1): SMALL, (4096, 4096, 16): TILES}))
    assert "Some GPU (compute capability 9.0), driver 1.2, current.sm 10 MHz, ECC Enabled" in text
    assert "torch 2 (CUDA 12), triton 3" in text and "skipped: x: why" in text
    assert "4096 x 4096, 16 rows" in text and "[p20, p80] of 5 replays" in text and "goals: 2 of 2 reached" in text
    assert "where others are faster" not in text


def test_the_report_says_where_others_are_faster() -> None:
    found = results({(4096, 4096, 1): SMALL})
    sides = {"float16": side(None, 1e-6, 10**8), "int4-g128": side(SMALL, 2e-6, 10**7),
             "torch-int4-g128": {**side(None, 1e-6, 10**7), "family": "torch"},
             "torch-int-mm": {**side(None, 1e-6, 10**8), "family": "torch"}}  # fmt: skip
    found["settings"] = [gpu_report.setting(4096, 4096, 1, sides, found["copy"])]
    text = shown(found)
    assert "4096 x 4096, 1 row: int4-g128 is behind float16 (2.00x), torch-int4-g128 (2.00x)" in text
    assert "torch-int-mm (" not in text  # of twice the bits
    assert "goals: 0 of 2 reached" in text


def test_goals_count_only_where_they_were_measured() -> None:
    found = {(goal.side, goal.rows, goal.must) for goal, _, _ in gpu_goals.found(results({(4096, 4096, 1): SMALL})["settings"])}
    assert found == {("int4-g128", 1, 1.4)}
    assert not list(gpu_goals.found(results({(64, 64, 1): SMALL})["settings"]))
    for goal in gpu_goals.GOALS:
        assert goal.must <= goal.good and goal.side.split(" ")[0] in FORMATS
        known = {s.name for s in gpu_peers.sides("all")}
        assert goal.against in known and str(goal.rows) in gpu.ROWS.split(",")


def test_spreads_are_of_the_samples() -> None:
    found = gpu_timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found["median"], found["p20"], found["p80"]) == (3.5, 2.0, 5.0)


# ---- what is asked for


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=0)
    assert gpu.main([]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "gpu: nothing was measured: device cuda: torch finds no GPU" in captured.err
    fake_gpus(monkeypatch, count=1, triton=False)
    assert gpu.main([]) == 4 and "kernels need Triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--formats", "int5"], "unknown format 'int5'; known: int8"),
        (["--activations", "int4"], "unknown kind of activations 'int4'"),
        (["--dtypes", "float32"], "unknown type 'float32'"),
        (["--rows", "0"], "--rows is '0', expected numbers from 1 up"),
        (["--shapes", "4096"], "--shapes is '4096', expected two numbers as 4096x4096"),
        (["--peers", "cutlass"], "unknown peer 'cutlass'"),
        (["--budget", "0"], "--budget is 0, expected seconds above 0"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--replays", "1"], "--replays is 1, expected at least 2"),
        (["--device", "cpu"], "tools/bench/kernels a CPU"),
    ],
)
def test_what_is_not_understood_is_refused_before_a_gpu_is_looked_for(arguments, words, capsys) -> None:
    assert gpu.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_nvidia_smi_says_and_does_not_say() -> None:
    said = ", ".join(f"value {i}" for i in range(len(gpu.QUERY)))
    answers = lambda code, text: lambda command, **_: SimpleNamespace(returncode=code, stdout=text)  # noqa: E731
    assert gpu.smi("0", answers(0, said + "\n"))["ecc.mode.current"] == "value 5"
    assert set(gpu.smi("0", answers(9, "no devices")).values()) == {"unknown"}

    def missing(command, **_):
        raise FileNotFoundError

    assert set(gpu.smi("0", missing).values()) == {"unknown"}


def test_a_machine_without_git_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert artifacts.git("rev-parse", "HEAD") == ""
    found = results({(64, 64, 1): SMALL})
    found["machine"]["commit"] = ""
    assert "commit unknown" in shown(found)


def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """As much of torch.cuda as a measurement asks for: graphs know how many calls they have, of 60 µs each."""
    graphs: list[SimpleNamespace] = []
    clock = [0.0]
    stream = SimpleNamespace(wait_stream=lambda other: None)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            assert self.at is not None

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def made() -> SimpleNamespace:
        def replay() -> None:
            graph.replays += 1
            clock[0] += graph.seconds

        graph = SimpleNamespace(replay=replay, replays=0, calls=0, seconds=0.0)
        graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def captured(graph: SimpleNamespace, stream: Any):
        before = calls[0]
        yield
        graph.calls = calls[0] - before
        graph.seconds = 6e-5 * graph.calls

    calls = [0]
    capture = gpu_timing._captured

    def counted(given: Any, times: int) -> Any:
        def one(call: Any) -> Any:
            calls[0] += 1
            return call()

        return capture([lambda call=call: one(call) for call in given], times)

    monkeypatch.setattr(gpu_timing, "_captured", counted)
    for name, value in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("Event", Event), ("CUDAGraph", made)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda place: contextlib.nullcontext())
    return graphs


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_run_measures_every_side_that_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On the CPU, with the graphs replaced: our kernel interpreted, float16 as torch has it there."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    from qcompiler.gpu import implementation
    from qcompiler.ops import torch_ops

    monkeypatch.setattr(torch_ops, "overload", implementation)
    monkeypatch.setattr(gpu, "gpu", lambda name: CPU)
    graphs = recorded_graphs(monkeypatch)
    described = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=2, total_memory=2**35, L2_cache_size=2**26)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    monkeypatch.setattr(gpu_timing, "copies", lambda size, cold: 2)
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1000)
    arguments = ["--formats", "vq3", "--activations", "float", "--rows", "1,2", "--shapes", "16x128", "--replays", "3"]
    found = gpu.run(gpu.options([*arguments, "--peers", "torch"]))
    assert [(setting["n"], setting["k"], setting["rows"]) for setting in found["settings"]] == [(16, 128, 1), (16, 128, 2)]
    for setting in found["settings"]:
        assert list(setting["sides"]) == ["float16", "bfloat16", "vq3"]
        vq3 = setting["sides"]["vq3"]
        assert vq3["kernel"] == "dot" and vq3["matrices"] == 2 and vq3["error"] < 0.001
        assert vq3["ratios"]["float16"] == pytest.approx(1) and vq3["seconds"]["median"] == pytest.approx(6e-5)
    assert found["copy"]["median"] == pytest.approx(2000 / 6e-5) and found["unmeasured"] == []
    assert found["machine"]["device"] == "A GPU" and found["machine"]["capability"] == "9.0"
    # The copy, and three sides in two settings: a graph that is too short for the clock, and one that is not.
    assert [graph.calls for graph in graphs] == [1, 4] + [2, 4] * 6
    assert all(graph.replays == (1 if number % 2 == 0 else 3 + 3) for number, graph in enumerate(graphs))
    assert set(found["skipped"]) == {"torch-int4-g32", "torch-int4-g128", "torch-int-mm"}
    assert "vq3" in shown(found)

    monkeypatch.setattr(gpu_dispatch, "candidates", lambda side, rows, search: [TILES, Choice("int_mm", {"chunk": 0}), WHOLE])
    searched = gpu.measure(Ours("vq3"), case(16, 128, 2), 3, "few")
    assert [one["kernel"] for one in searched["tried"]] == ["dot", "matmul"] and searched["kernel"] == "dot"
    assert len(searched["failed"]) == 1 and searched["failed"][0].startswith("int_mm chunk=0: ")


def test_what_was_measured_is_kept_though_a_run_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a budget, which says what is missing, or by the machine: the file is whole after every setting."""
    now, path = [0.0], tmp_path / "found.json"

    def measured(side, case, *_) -> dict:
        if cut and case.rows == 4:
            raise KeyboardInterrupt
        now[0] += 10
        return side_figures

    side_figures, cut = side(None, 1e-6), False
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "gpu", lambda name: CPU)
    monkeypatch.setattr(gpu, "machine", lambda device: results({})["machine"])
    monkeypatch.setattr(gpu.torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu_timing, "copy_rate", lambda device, replays: seconds(1e9))
    monkeypatch.setattr(gpu, "measure", measured)
    arguments = ["--formats", "none", "--peers", "none", "--shapes", "16x64,32x64", "--rows", "1,4", "--json", str(path)]
    assert gpu.main([*arguments, "--budget", "45"]) == 0
    found = json.loads(path.read_text())
    assert [(s["n"], s["rows"], len(s["sides"])) for s in found["settings"]] == [(16, 1, 2), (32, 1, 2), (16, 4, 1)]
    assert found["unmeasured"] == ["16 x 64, 4 rows: bfloat16", "32 x 64, 4 rows: float16", "32 x 64, 4 rows: bfloat16"]
    assert "NOT MEASURED, the run ended before: 3, from 16 x 64, 4 rows: bfloat16 on" in shown(found)

    cut = True
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        gpu.main(arguments)
    assert [(s["n"], s["rows"]) for s in json.loads(path.read_text())["settings"]] == [(16, 1), (32, 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_kernels_are_compiled_by_side_and_choice() -> None:
    """Cases with the same kernel and configuration share most of what is compiled: one process goes through them."""
    pytest.importorskip("triton")
    cases = [case(n, 4096, rows) for rows in (1, 4, 16, 64) for n in (4096, 8192)]
    sides = [Ours("int4-g128"), Ours("vq3", "int8")]
    found = gpu_compile.tasks(sides, cases, gpu.NAMED)
    assert [(s.name, s.choice.kernel, len(own)) for s, own in found] == [
        ("int4-g128", "gemv", 2), ("int4-g128", "dot", 4), ("int4-g128", "dot", 2), ("vq3 int8", "dot", 6),
        ("vq3 int8", "dot", 2),
    ]  # fmt: skip
    every = gpu_compile.tasks(sides, cases, "few")
    tried = [(c.text, own.rows) for own in cases for c in gpu_dispatch.candidates(sides[0], own.rows, "few")]
    assert sorted((s.choice.text, own.rows) for s, each in every if s.name == "int4-g128" for own in each) == sorted(tried)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_processes_compile_and_say_nothing_of_what_fails(capfd: pytest.CaptureFixture) -> None:
    """Without a GPU every call fails there; the run goes on to measure, which tells why."""
    pytest.importorskip("triton")
    gpu_compile.compiled([Ours("int8"), Ours("vq3")], [case(16, 128)], gpu.NAMED, 2, command.Budget(None))
    assert capfd.readouterr().err == "compiling: 2 kernels and configurations by 2 processes\n"
    assert gpu_compile.call(Ours("int8"), [case(16, 128)] * 2) == 0


def test_a_run_goes_from_options_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With the measuring replaced: what is asked for reaches every side, and JSON and table come out."""
    found = results({(64, 64, 1): SMALL})
    monkeypatch.setattr(gpu, "run", lambda chosen, keep: found)
    json_file, table_file = tmp_path / "found.json", tmp_path / "dispatch.json"
    assert gpu.main(["--json", str(json_file), "--write-dispatch", str(table_file)]) == 0
    written = json.loads(json_file.read_text())
    assert written["report"] == "bench-gpu" and written["settings"][0]["sides"]["int4-g128"]["kernel"] == "gemv"
    assert json.loads(table_file.read_text())["devices"]["Some GPU"][0]["kernel"] == "gemv"
    assert "64 x 64, 1 row" in capsys.readouterr().out
