"""Instruction sets: which one a CPU gets, results against the generic one, memory, threads, and what the objects hold."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.runtime import exercised, native_programs, vq_oracle
from tests.runtime.attention_library import DIGEST
from tests.runtime.kernel_library import Edges, KernelError
from tests.runtime.kernel_oracle import make_weight
from tests.runtime.native_programs import ROOT, run
from tests.runtime.test_kernels import ISAS, PATH
from tests.runtime.vq_library import VqLibrary
from tools import kernel_instructions as instructions

LIBRARY = VqLibrary(PATH) if PATH is not None and PATH.exists() else None
X86 = exercised.MACHINE == "x86_64"
# Affine forms of two ops, three of the third, and vector-quantized ones: what runtime/tests/cases.cpp lists.
FORMS = 4 * 4 * 2 * (4 + 4 + 3) + 8 * 7 * 2
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no op library: {PATH}")
needs_x86 = pytest.mark.skipif(not X86, reason="about the kernels for x86-64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def library_objects() -> list[Path]:
    return native_programs.objects()


@pytest.fixture(scope="module")
def compare(folder: Path, library_objects: list[Path]) -> Path:
    return native_programs.link(folder, "compare_kernels", library_objects)


@pytest.fixture(scope="module")
def stress(folder: Path, library_objects: list[Path]) -> Path:
    return native_programs.link(folder, "stress_kernels", library_objects)


def test_attention_is_what_it_was(folder: Path, library_objects: list[Path]):
    """Every instruction set, one thread and three, all rows at once and one by one; and the same numbers on every machine."""
    program = native_programs.link(folder, "compare_attention", library_objects)
    assert run(program, "60").stdout.splitlines() == [DIGEST, "60 cases"]


def isas_of(*command: str | Path, isa: str | None = None) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "QCOMPILER_ISA"}
    return run(*command, "isas", env=env | ({"QCOMPILER_ISA": isa} if isa else {})).stdout.splitlines()


# ── Which one a CPU gets ──


@needs_library
def test_the_best_comes_first():
    assert ISAS == [isa for isa in exercised.COMPILED if isa in ISAS] and ISAS[-1] == "generic"


def test_each_can_be_asked_for(compare):
    features, names, best = isas_of(compare)
    for isa in names.split(","):
        assert isas_of(compare, isa=isa) == [features, names, isa]
    assert best == names.split(",")[0] and isas_of(compare, isa="sse9") == [features, names, ""]


EMULATED = {"Nehalem": ["generic"], "Haswell-noTSX": ["avx2", "generic"]}


@needs_x86
@pytest.mark.parametrize("cpu", EMULATED)
def test_a_lesser_cpu_gets_what_it_executes(compare, stress, cpu):
    if not shutil.which("qemu-x86_64"):
        pytest.skip("no qemu-x86_64 (Debian: apt install qemu-user)")
    emulate = ("qemu-x86_64", "-cpu", cpu)
    assert isas_of(*emulate, compare)[1].split(",") == EMULATED[cpu]
    # It stops at an instruction that it lacks. No guarded pages: qemu reads all of what a masked load only names.
    assert f"({','.join(EMULATED[cpu])})" in run(*emulate, stress, "heap", "100").stdout


@needs_x86
def test_avx_vnni_is_looked_for_where_it_is_said():
    """CPUID 7.1 EAX bit 4, which is below the register files that the system saves, and no bit of 7.0."""
    text = (ROOT / "runtime" / "cpu" / "cpu_features.cpp").read_text()
    assert "f.avxvnni = seven.a >= 1 && bit(seven_one.a, 4);" in text
    assert text.index("if (!ymm") < text.index("f.avxvnni") < text.index("if (!zmm)") < text.index("f.avx512f =")


# ── Alignment ──


def shifted(array: np.ndarray) -> np.ndarray:
    """A copy that begins one byte too late for its type."""
    raw = np.zeros(array.nbytes + array.itemsize, np.uint8)
    start = 1 + -raw.ctypes.data % array.itemsize
    raw[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return np.ndarray(array.shape, array.dtype, raw.data, start)


@needs_library
@pytest.mark.parametrize("what, size", [("scales", 2), ("x", 4), ("bias", 4)])
def test_an_address_that_c_does_not_allow_is_refused(what, size):
    rng = np.random.default_rng(0)
    weight = make_weight(rng, 16, 64, 4, 32, False)
    values = {"x": rng.standard_normal((2, 64)).astype(np.float32), "bias": np.zeros(16, np.float32)}
    shapes = {"scales": weight.scales.shape, "x": (2, 64), "bias": (16,)}

    def place(array: np.ndarray) -> np.ndarray:
        return shifted(array) if array.shape == shapes[what] and array.itemsize == size else np.array(array)

    with pytest.raises(KernelError, match=rf"{what} lies at address 0x[0-9a-f]+, expected a multiple of {size}"):
        LIBRARY.linear(weight, values["x"], 2, values["bias"], place=place)


# ── Results ──


@needs_library
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_experts_outliers_and_edges_equal_generic(activation):
    rng = np.random.default_rng(activation)
    weights = [make_weight(rng, 64, 150, 4, 32, True) for _ in range(3)]
    x = rng.standard_normal((5, 150)).astype(np.float32)
    books = vq_oracle.make_weight(rng, vq_oracle.VqForm(2, 64, 16, 128, 64), 64, 150)
    outliers = rng.standard_normal((64, 2)).astype(np.float16)
    around = Edges(rng.standard_normal(150).astype(np.float32), 1e-5, rng.standard_normal((5, 32)).astype(np.float32), 1)
    for isa in ISAS:
        calls = {
            "experts": lambda isa: LIBRARY.experts(weights, x, [2, 0, 2, 1, 0], activation, isa=isa),
            "mixed": lambda isa: LIBRARY.linear(weights[0], x, activation, columns=[3, 149], outliers=outliers, isa=isa),
            "linear": lambda isa: LIBRARY.linear(weights[0], x, activation, edges=around, isa=isa),
            "vq": lambda isa: LIBRARY.linear_vq(books, x, activation, edges=around, isa=isa),
        }
        for name, call in calls.items():
            if name != "vq" or activation != 1:
                assert call(isa).tobytes() == call("generic").tobytes(), (name, isa)


@pytest.mark.parametrize("rounds", [2, pytest.param(26, marks=pytest.mark.slow)])
def test_every_kernel_equals_the_generic_one(compare, rounds):
    """To the bit, each buffer against an inaccessible page at either end, and at odd addresses."""
    done = run(compare, str(rounds * FORMS), str(rounds)).stdout
    exercised.record_output(done)
    names = isas_of(compare)[1]
    assert f"{len(names.split(',')) * FORMS} of {len(exercised.COMPILED) * FORMS} kernels exercised ({names})" in done


@pytest.mark.parametrize("buffer", ["codes", "scales", "books", "x", "y"])
def test_the_guard_catches_an_access_too_far(compare, buffer):
    for isa in isas_of(compare)[1].split(","):
        done = run(compare, "canary", buffer, isa, check=False)
        assert done.returncode == -signal.SIGSEGV, (isa, done.stdout)


# ── Load ──


def test_callers_at_once_get_the_values_of_one(stress):
    assert ", 0 different" in run(stress, "threads", "4").stdout


def test_memory_does_not_grow(stress):
    assert "20000 runs" in run(stress, "soak", "20000").stdout


def test_growth_would_be_noticed(stress):
    done = run(stress, "soak", "20000", "16", check=False)
    assert done.returncode == 1 and "anonymous memory grew" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test-kernels", "test-soak", "test-sanitizers", "test-instructions"])
def test_long_forms(command):
    run(ROOT / "tools" / command)


@pytest.mark.parametrize("command", ["test-kernels", "test-soak", "test-sanitizers", "test-instructions", "test-aarch64"])
def test_help(command):
    text = run(ROOT / "tools" / command, "--help").stdout
    assert f"tools/{command}" in text and "#!/" not in text and "set -" not in text


# ── Instructions ──


@pytest.fixture(scope="module")
def compiled(library_objects: list[Path]) -> instructions.Objects:
    objdump = "aarch64" if not X86 else "x86_64"
    if not instructions.objdump_of(objdump):
        if "native" in exercised.requested():
            pytest.fail("no objdump (Debian: apt install binutils)")
        pytest.skip("no objdump (Debian: apt install binutils)")
    root = next(path for path in library_objects[0].parents if path.name == "qcompiler_cpu.dir")
    return instructions.read(root)


def test_kernels_hold_what_they_are_named_after(compiled):
    assert not list(compiled.problems())


WRONG = {
    "an instruction that is not there": (
        instructions.claim("avx2/linear_int8", r"tile_int8<(\d)\b", has="vpdpbusd"),
        "avx2/linear_int8: void tile_int8<.* has no vpdpbusd",
    ),
    "the other encoding": (
        instructions.claim("avx2vnni/avxvnni/vq_int8", r"tile_vq_int8<", has="vpdpbusd/EVEX"),
        "has no vpdpbusd/EVEX",
    ),
    "a narrower register": (
        instructions.claim("avx2vnni/avx512vl/linear_int8", "tile_int8<", has="vpdpbusd/zmm"),
        "no vpdpbusd/zmm",
    ),
    "one too much": (instructions.claim(r"avx512/\w+", lacks="EVEX"), "avx512/.* of EVEX"),
    "a function that is not there": (
        instructions.claim("avx512vbmi/vq_int8", r"tile_int8<(\w+)", ("Pairs128",)),
        "no function .* for Pairs128",
    ),
    "an object that is not there": (instructions.claim("avx10/linear_int8"), "no object is named avx10/linear_int8"),
}


@needs_x86
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_claim_is_noticed(compiled, what):
    claim, text = WRONG[what]
    found = list(instructions.check((claim,), compiled.functions))
    assert found and re.search(text, found[0]), found[:3]


def lacking(counts: Counter[str], names: list[str]) -> Counter[str]:
    return Counter({name: count for name, count in counts.items() if name not in names})


def test_a_claim_of_a_table_is_noticed_once_its_instruction_goes(compiled):
    """Every claim that something is there, held against the same objects without it."""
    for claim in instructions.X86 if X86 else instructions.ARM:
        for needed in claim.has:
            without = {
                path: [dataclasses.replace(f, counts=lacking(f.counts, needed.split("|"))) for f in functions]
                for path, functions in compiled.functions.items()
            }
            assert any(needed.replace("|", " or ") in text for text in instructions.check((claim,), without)), (claim, needed)


LISTING = """
0000000000000000 <void qc::(anonymous namespace)::tile_int8<4, true, 1>(qc::LinearJob const&, long, long)>:
   0:\tc4 42 25 50 fe       \t{vex} vpdpbusd %ymm14,%ymm11,%ymm15
   5:\t62 f2 75 28 50 c5    \tvpdpbusd %ymm5,%ymm1,%ymm0
   b:\t62 f2 75 48 50 c5    \tvpdpbusd %zmm5,%zmm1,%zmm0
  11:\t66 0f ef c0          \tpxor   %xmm0,%xmm0
  15:\t67 c5 fe 6f 00       \tvmovdqu (%eax),%ymm0
"""


def test_encodings_are_told_by_their_bytes():
    (function,) = instructions.parse(LISTING, x86=True)
    assert function.name.startswith("void tile_int8<4, true, 1>(")
    assert function.counts == {
        "vpdpbusd": 3, "vpdpbusd/VEX": 1, "vpdpbusd/EVEX": 2, "vpdpbusd/zmm": 1, "VEX": 2, "EVEX": 2, "zmm": 1, "pxor": 1,
        "vmovdqu": 1, "vmovdqu/VEX": 1,
    }  # fmt: skip


@needs_x86
@pytest.mark.slow
def test_what_is_compiled_for_avx_vnni_computes_the_same(folder, library_objects, compare):
    """A CPU without AVX-VNNI but with AVX-512VL executes the very code of avxvnni once vpdpbusd is encoded in EVEX."""
    if "avx512vl" not in isas_of(compare)[1].split(","):
        pytest.skip("this CPU has no AVX-512 VNNI")
    changed = []
    for path in library_objects:
        name = str(path).split("qcompiler_cpu.dir/")[1]
        if not name.startswith("avx2vnni/avxvnni/") and name != "cpu_features.cpp.o":
            changed.append(path)
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-fPIC", "-DQC_HAVE_X86_KERNELS=1"]
    vnni = ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]
    for name in ("kernels", "linear_int8", "panel", "vq_int8"):
        source = native_programs.CPU / "avx2vnni" / "avxvnni" / f"{name}.cpp"
        assembly = folder / f"{name}.s"
        run(native_programs.COMPILER, *flags, *vnni, "-S", source, "-o", assembly)
        text = assembly.read_text()
        assert ("{vex} vpdpbusd" in text) == (name != "kernels")
        assembly.write_text(text.replace("{vex} vpdpbusd", "vpdpbusd"))
        run(native_programs.COMPILER, "-c", assembly, "-o", folder / f"{name}.avxvnni.o")
        changed.append(folder / f"{name}.avxvnni.o")
    features = (native_programs.CPU / "cpu_features.cpp").read_text()
    detected = "f.avxvnni = seven.a >= 1 && bit(seven_one.a, 4);"
    assert features.count(detected) == 1
    pretended = folder / "cpu_features.cpp"
    pretended.write_text(features.replace(detected, "f.avxvnni = true;"))
    run(native_programs.COMPILER, *flags, f"-I{native_programs.CPU}", "-c", pretended, "-o", folder / "cpu_features.o")
    other = folder / "avxvnni"
    other.mkdir()
    program = native_programs.link(other, "compare_kernels", [*changed, folder / "cpu_features.o"])
    done = run(program, str(8 * FORMS)).stdout
    assert "exercised avxvnni:" in done
    exercised.record_output(done)
