"""The aarch64 kernels, cross-compiled: the instructions that they hold, and every kernel against the generic one under qemu.

Without a cross compiler these tests are skipped, unless environment variable QCOMPILER_EXPECT contains "neon". They build in the
folder that QCOMPILER_AARCH64 names, where most may be done already. tools/test-aarch64 and --slow take more shapes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.runtime import exercised
from tests.runtime.attention_library import DIGEST
from tools import kernel_instructions

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64", "cmake", "ninja")
# (op, form) pairs of runtime/tests/cases.cpp: affine weights of three ops, and vector-quantized ones.
FORMS = 4 * 4 * 2 * (4 + 4 + 3) + 8 * 7 * 2
ISAS = ["neon-i8mm", "neon-dotprod", "generic"]
DECODERS = ("Pairs16", "Single<3>", "Single<4>", "Pairs<32>", "Pairs<64>", "Vectors256<2>", "Vectors256<4>")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of preset aarch64-linux: the program that compares kernels, and the library's objects."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        text = f"aarch64 kernels not built: no {', '.join(missing)} (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
        if "neon" in exercised.requested():
            pytest.fail(text)
        pytest.skip(text)
    named = os.environ.get("QCOMPILER_AARCH64")
    folder = Path(named) if named else tmp_path_factory.mktemp("aarch64-linux")
    make(ROOT / "runtime", folder, "compare_kernels", "compare_attention")
    return folder


def make(source: Path, folder: Path, *targets: str) -> None:
    run("cmake", "--preset", "aarch64-linux", "-B", folder, cwd=source)
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1), "--target", *targets)


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compare(build: Path, *arguments: str, cpu: str = "max", isa: str | None = None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "QCOMPILER_ISA"}
    if isa:
        env["QCOMPILER_ISA"] = isa
    command = ["qemu-aarch64", "-cpu", cpu, str(build / "cpu" / "compare_kernels"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_attention_is_that_of_other_machines(build: Path):
    assert run("qemu-aarch64", "-cpu", "max", build / "cpu" / "compare_attention", "60").splitlines() == [DIGEST, "60 cases"]


# ── Instructions ──


@pytest.fixture(scope="module")
def objects(build: Path) -> kernel_instructions.Objects:
    return kernel_instructions.read(build)


@pytest.fixture(scope="module")
def functions(objects: kernel_instructions.Objects) -> list[tuple[str, Counter]]:
    """(demangled name, how often it has each mnemonic) of every function of the kernels."""
    return [(function.name, function.counts) for found in objects.functions.values() for function in found]


def test_kernels_hold_what_they_are_named_after(objects):
    assert not list(objects.problems())


def matching(functions: list[tuple[str, Counter]], pattern: str) -> list[tuple[tuple[str, ...], Counter]]:
    found = ((re.match(r"void " + pattern, name), counts) for name, counts in functions)
    return [(match.groups(), counts) for match, counts in found if match]


def test_integer_kernels_multiply_with_what_they_are_named_after(functions):
    """Lane by lane for any number of rows, and as a matrix from four rows on; each compiled once."""
    kinds = {"Lanes": ("sdot", "smmla"), "Matrices": ("smmla", "sdot")}
    affine = matching(functions, r"tile_int8<(\w+), (\d), (\d)>\(")
    vq = matching(functions, r"tile_vq_int8<(\w+), (\w+(?:<\d+>)?), (\d)>\(")
    for (kind, *what), counts in affine + vq:
        has, lacks = kinds[kind]
        assert counts[has] and not counts[lacks], (kind, what, counts)
    rows = [("Lanes", r) for r in "1248"] + [("Matrices", r) for r in "48"]
    assert Counter(key for key, _ in affine) == Counter((kind, bits, r) for bits in "8432" for kind, r in rows)
    assert Counter(key for key, _ in vq) == Counter((kind, decoder, r) for decoder in DECODERS for kind, r in rows)


def test_indices_are_looked_up_in_registers(functions):
    floats = matching(functions, r"tile_vq_float<(\w+(?:<\d+>)?), (\d)>\(")
    assert Counter(key for key, _ in floats) == Counter(itertools.product(DECODERS, "124"))
    integers = matching(functions, r"tile_vq_int8<\w+, (\w+(?:<\d+>)?), (\d)>\(")
    for (decoder, rows), counts in floats + integers:
        assert counts["tbl"], (decoder, rows)
        assert bool(counts["tbx"]) == decoder.startswith("Vectors256"), (decoder, rows)


def test_float_kernels_fuse_four_rows_at_once(functions):
    affine = matching(functions, r"tile_float<(\d), (\d)>\(")
    assert Counter(key for key, _ in affine) == Counter(itertools.product("8432", "124"))
    for key, counts in affine + matching(functions, r"tile_vq_float<(\w+(?:<\d+>)?), (\d)>\("):
        # A chunk has 32 columns, and four registers of rows, or of activations, meet there; scalars have fmadd.
        assert counts["fmla"] >= 128, (key, counts["fmla"])


def test_no_other_function_needs_more_than_the_base_architecture(functions):
    products = {"sdot", "udot", "usdot", "sudot", "smmla", "ummla", "usmmla"}
    for name, counts in functions:
        if not re.match(r"void tile_(vq_)?int8<", name):
            assert not products & set(counts), (name, products & set(counts))


# ── Results ──


@pytest.mark.parametrize(
    "cpu, features, isas",
    [
        ("cortex-a53", "neon", ISAS[2:]),
        ("neoverse-n1", "neon,dotprod", ISAS[1:]),
        ("max", "neon,dotprod,i8mm", ISAS),
    ],
)
def test_a_cpu_gets_what_it_executes(build, cpu, features, isas):
    assert compare(build, "isas", cpu=cpu).stdout.splitlines() == [features, ",".join(isas), isas[0]]
    for name in ISAS:
        chosen = compare(build, "isas", cpu=cpu, isa=name).stdout.splitlines()
        assert chosen == [features, ",".join(isas), name if name in isas else ""]


@pytest.mark.parametrize("cpu, isas", [("neoverse-n1", ISAS[1:]), ("cortex-a53", ISAS[2:])])
def test_a_cpu_stops_at_no_instruction(build, cpu, isas):
    done = compare(build, str(FORMS // 8), cpu=cpu)
    assert done.returncode == 0 and f"({','.join(isas)})" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kernel_equals_the_generic_one(build, rounds):
    """To the bit, every buffer against an inaccessible page, and at odd addresses."""
    done = compare(build, str(rounds * FORMS))
    assert done.returncode == 0, done.stdout + done.stderr
    exercised.record_output("\n".join(line for line in done.stdout.splitlines() if " generic:" not in line))
    kernels = done.stdout.splitlines()[-1]
    assert kernels == f"{len(ISAS) * FORMS} of {len(ISAS) * FORMS} kernels exercised ({','.join(ISAS)})"


@pytest.mark.parametrize(
    "buffer, isa", [*zip(("codes", "scales", "books", "x", "y"), (*ISAS, *ISAS), strict=False)]
)
def test_the_guard_catches_an_access_too_far(build, buffer, isa):
    done = compare(build, "canary", buffer, isa)
    assert done.returncode == -signal.SIGSEGV, done.stdout


BROKEN = {
    "dots.h": ("vzip2q_s64(low, high) : vzip1q_s64", "vzip1q_s64(low, high) : vzip1q_s64", "neon-i8mm: differs"),
    "vq_decoders.h": ("256 * d + 64 * T", "256 * d + 64 * (T % 3)", "vq2d256"),
    "quantize.cpp": ("vcvtnq_s32_f32", "vcvtaq_s32_f32", "differs first at"),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", BROKEN)
def test_a_broken_kernel_is_noticed(build, tmp_path_factory, file):
    """Depends on `build` for its tools alone."""
    right, wrong, said = BROKEN[file]
    source = tmp_path_factory.mktemp("broken") / "runtime"
    shutil.copytree(ROOT / "runtime", source, ignore=shutil.ignore_patterns("build", "lib", "*.py", "__pycache__", ".*"))
    kernel = source / "cpu" / "neon" / file
    text = kernel.read_text()
    assert text.count(right) == 1
    kernel.write_text(text.replace(right, wrong))
    make(source, source / "build", "compare_kernels")
    done = compare(source / "build", str(3 * FORMS))
    assert done.returncode == 1 and said in done.stdout, done.stdout


@pytest.mark.slow
def test_exhaustively(build):
    """tools/test-aarch64: more shapes, and the generic results held against those of this machine's own architecture."""
    assert "the same generic results" in run(ROOT / "tools" / "test-aarch64")
