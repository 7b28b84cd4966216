"""What a test run says about kernels, and when it fails for one that it never ran."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.runtime import exercised, kernel_report

EVERYWHERE = {kernel for isa in (*exercised.COMPILED, *exercised.NEON) for kernel in exercised.kernels(isa)}


def config(**options) -> SimpleNamespace:
    said = {"keyword": "", "markexpr": "", "collectonly": False, "lf": False} | options
    return SimpleNamespace(option=SimpleNamespace(**said), args=["tests"])


class Lines:
    def __init__(self):
        self.text = ""

    def section(self, name: str) -> None:
        self.text += f"== {name}\n"

    def write_line(self, line: str, **markup) -> None:
        self.text += line + "\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """A whole run, of which `ran` is what ran, on a CPU that executes avx2; returns its exit status and what it said."""

    def end(ran: set[tuple[str, str]], expect: str = "", **options) -> tuple[int, str]:
        monkeypatch.setenv("QCOMPILER_EXPECT", expect)
        monkeypatch.setattr(exercised, "RAN", ran)
        monkeypatch.setattr(kernel_report, "COLLECTED", set(kernel_report.FILES))
        monkeypatch.setattr(kernel_report, "executable", lambda: ["avx2", "generic"])
        session = SimpleNamespace(config=config(**options), exitstatus=0, shouldstop=False, shouldfail=False)
        kernel_report.pytest_sessionfinish(session)
        lines = Lines()
        kernel_report.pytest_terminal_summary(lines, session.exitstatus, session.config)
        return int(session.exitstatus), lines.text

    return end


def only(*isas: str) -> set[tuple[str, str]]:
    return {kernel for kernel in EVERYWHERE if kernel[0] in isas}


def test_all_that_the_cpu_has(run):
    status, text = run(only("avx2", "generic"))
    assert status == 0 and "expected, and not exercised" not in text
    assert f"{2 * len(exercised.OPS) + 2} of " in text and "neon" not in text


def test_one_kernel_of_the_cpu_that_did_not_run(run):
    status, text = run(only("avx2", "generic") - {("avx2", "vq-int8")})
    assert status == 1 and "expected, and not exercised: avx2 vq-int8 (" in text


def test_what_is_asked_for_must_run_too(run):
    both = only("avx2", "generic", "neon-dotprod", "neon-i8mm")
    assert run(both, "neon,native")[0] == 0
    status, text = run(both - {("neon-i8mm", "linear-int8")}, "neon")
    assert status == 1 and "neon-i8mm linear-int8" in text
    assert run(only("avx2", "generic"), "neon-dotprod")[0] == 1
    assert run(only("avx2", "generic"))[0] == 0


@pytest.mark.parametrize("options", [{"keyword": "vq"}, {"markexpr": "slow"}, {"lf": True}])
def test_a_part_of_the_tests_is_held_to_nothing(run, options):
    status, text = run(only("generic"), **options)
    assert status == 0 and "== kernels" in text and "expected, and" not in text


def test_what_programs_print_counts():
    before = set(exercised.RAN)
    try:
        exercised.RAN.clear()
        exercised.record_output("digest 1\nexercised sse9: linear-float vq-int8\n2 of 3 kernels exercised (sse9)\n")
        exercised.record("sse8", "linear", 2, edges=True)
        exercised.record("sse8", "mixed", 0)
        assert {op for isa, op in exercised.RAN if isa == "sse9"} == {"linear-float", "vq-int8"}
        assert exercised.RAN >= {("sse8", "linear-int8-edges"), ("sse8", "mixed-float")} and len(exercised.RAN) == 4
    finally:
        exercised.RAN.clear()
        exercised.RAN.update(before)


def test_processes_tell_the_first_one_what_they_ran(run, monkeypatch: pytest.MonkeyPatch):
    """Half of the kernels ran in one process, half in another; neither is held to all of them."""
    everything, outputs = sorted(only("avx2", "generic")), []
    for half in (everything[::2], everything[1::2]):
        worker = SimpleNamespace(config=config(), exitstatus=0, shouldstop=False, shouldfail=False)
        worker.config.workeroutput = {}
        with monkeypatch.context() as here:
            here.setattr(exercised, "RAN", set(half))
            here.setattr(kernel_report, "COLLECTED", set(kernel_report.FILES))
            kernel_report.pytest_sessionfinish(worker)
        assert worker.exitstatus == 0
        outputs.append(json.loads(json.dumps(worker.config.workeroutput)))  # it goes through a pipe

    def merged(parts) -> set[tuple[str, str]]:
        ran: set[tuple[str, str]] = set()
        with monkeypatch.context() as here:
            here.setattr(exercised, "RAN", ran)
            here.setattr(kernel_report, "COLLECTED", collected := set())
            for output in parts:
                kernel_report.pytest_testnodedown(SimpleNamespace(workeroutput=output), None)
            kernel_report.pytest_testnodedown(SimpleNamespace(), "crashed before it said anything")
        assert collected == kernel_report.FILES
        return ran

    assert merged(outputs) == set(everything) and run(merged(outputs))[0] == 0
    assert run(merged(outputs[:1]))[0] == 1
