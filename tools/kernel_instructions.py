"""Whether compiled kernels hold the instructions that they are named after, and none that their CPU may lack.

    tools/test-instructions [FOLDER...]

FOLDER: a build folder, or one with the objects of its target qcompiler_cpu; without one, the library is built for this machine,
and for 64-bit ARM where the cross compiler is. Read with objdump: mnemonics function by function, and each instruction's encoding
from its bytes (0x62 begins EVEX, 0xc4 and 0xc5 VEX), so that neither a name nor a comment can pass for an instruction. Objects
that are compiled for one CPU may define no weak symbol: the linker keeps one copy for all, and it could be theirs.

Exit code 1: a claim of the tables below does not hold. 3: no objdump.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# ── Claims ──

BITS = ("8", "4", "3", "2")
VEX, EVEX, ZMM = "VEX", "EVEX", "zmm"
# Prefixes that may stand before the first byte of an opcode.
LEGACY = {0x66, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x67, 0xF0}
ARM_PRODUCTS = frozenset({"sdot", "udot", "usdot", "sudot", "smmla", "ummla", "usmmla"})


@dataclass(frozen=True)
class Claim:
    """About every function of some objects, or those of them that a pattern names.

    objects: pattern of paths below qcompiler_cpu.dir, without suffix
    functions: pattern of demangled names; its first group, if it has one, must take every value of `each`
    has, lacks: mnemonics, or VEX, EVEX, zmm; "name/zmm", "name/VEX", "name/EVEX": that one in that form; "a|b": one of these
    """

    objects: str
    functions: str = ""
    each: tuple[str, ...] = ()
    has: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()


def claim(objects: str, functions: str = "", each: tuple[str, ...] = (), has: str = "", lacks: str = "") -> Claim:
    return Claim(objects, functions, each, frozenset(has.split()), frozenset(lacks.split()))


DECODERS = ("Pairs16", "Single<3>", "Single<4>", "Pairs<32>", "Pairs<64>", "Vectors256<2>", "Vectors256<4>")
VBMI_DECODERS = ("Pairs16", "Pairs32", "Pairs64", "Single16")
VBMI_LARGE = ("Vectors256<2>", "Vectors256<4>")
LEVELS = r"tile_int8<(\d)\b"
ATTENTION = ("attend", "add_columns")
BOOKS = r"tile_(?:vq_)?int8<(\w+(?:<\d+>)?), \d"

X86 = (
    # What runs before a CPU is known, and on all of them.
    claim(r"(?!avx|edges_avx|attention_avx)[\w/]+", lacks="VEX EVEX"),
    claim(r"(avx2|avx2vnni/avxvnni)/\w+|(edges|attention)_avx2", lacks="EVEX"),
    claim(r"avx2/linear_int8", r"\bhalves<|tile_int8<(\d)\b", BITS, has="vpmaddubsw/VEX", lacks="vpdpbusd"),
    claim(r"avx2/vq_int8", BOOKS, DECODERS, has="vpmaddubsw/VEX vpshufb/VEX", lacks="vpdpbusd"),
    claim(r"avx2vnni/avxvnni/linear_int8", LEVELS, BITS, has="vpdpbusd/VEX", lacks="vpmaddubsw"),
    claim(r"avx2vnni/avxvnni/vq_int8", BOOKS, DECODERS, has="vpdpbusd/VEX vpshufb/VEX", lacks="vpmaddubsw"),
    # 512 bits at most to move memory.
    claim(r"avx2vnni/avx512vl/\w+", lacks="vpdpbusd/zmm vpshufb/zmm vpand/zmm vpandd/zmm vpsrlw/zmm"),
    claim(r"avx2vnni/avx512vl/linear_int8", LEVELS, BITS, has="vpdpbusd/EVEX", lacks="vpmaddubsw"),
    claim(r"avx2vnni/avx512vl/vq_int8", BOOKS, DECODERS, has="vpdpbusd/EVEX vpshufb", lacks="vpmaddubsw"),
    claim(r"avx512/linear_int8", LEVELS, BITS, has="vpdpbusd/zmm", lacks="vpmaddubsw"),
    claim(r"avx512/vq_int8", BOOKS, DECODERS, has="vpdpbusd/zmm vpshufb/zmm|vpermi2w/zmm|vpermt2w/zmm|vpermw/zmm"),
    claim(r"(avx512/\w+|(edges|attention)_avx512)", lacks="vpermb vpermi2b vpermt2b vpmultishiftqb"),
    claim(r"avx512vbmi/vq_int8", r"tile_int8<((?!Vectors)\w+), \d", VBMI_DECODERS, has="vpdpbusd/zmm vpermb/zmm"),
    claim(r"avx512vbmi/vq_int8", r"tile_int8<(Vectors256<\d>), \d", VBMI_LARGE, has="vpdpbusd/zmm vpermi2b/zmm|vpermt2b/zmm"),
    claim(r"avx512vbmi/vq_float", r"tile_float<((?!Vectors)\w+), \d", VBMI_DECODERS, has="vpermb/zmm vfmadd231ps/zmm"),
    # Many rows: every number that a block has.
    claim(r"avx2vnni/avxvnni/panel", r"multiply_block<Half, (\d)", ("5", "6"), has="vpdpbusd/VEX", lacks="vpmaddubsw"),
    claim(r"avx2vnni/avx512vl/panel", r"multiply_block<Half, (\d)", ("5", "6"), has="vpdpbusd/EVEX", lacks="vpmaddubsw"),
    claim(r"avx512/panel", r"multiply_block<Wide, (\d)", ("4", "6", "8"), has="vpdpbusd/zmm", lacks="vpmaddubsw"),
    claim(r"avx512/linear_float", r"tile_float<(\d)\b", BITS, has="vfmadd231ps/zmm"),
    # Scores, and products with the values.
    claim(r"attention_avx2", r"(attend|add_columns)\b", ATTENTION, has="vfmadd231ps/VEX|vfmadd213ps/VEX"),
    claim(r"attention_avx512", r"(attend|add_columns)\b", ATTENTION, has="vfmadd231ps/zmm|vfmadd213ps/zmm"),
)

ARM = (
    claim(r"(?!neon/(dotprod|i8mm)/)[\w/]+", lacks=" ".join(ARM_PRODUCTS)),
    claim(r"neon/dotprod/\w+", lacks="smmla ummla usmmla usdot sudot"),
    claim(r"neon/dotprod/linear_int8", r"tile_int8<Lanes, (\d), \d", BITS, has="sdot"),
    claim(r"neon/dotprod/vq_int8", r"tile_vq_int8<Lanes, (\w+(?:<\d+>)?), \d", DECODERS, has="sdot tbl"),
    claim(r"neon/i8mm/linear_int8", r"tile_int8<Matrices, (\d), \d", BITS, has="smmla", lacks="sdot"),
    claim(r"neon/i8mm/vq_int8", r"tile_vq_int8<Matrices, (\w+(?:<\d+>)?), \d", DECODERS, has="smmla tbl", lacks="sdot"),
)


# ── Reading ──


@dataclass
class Function:
    name: str
    counts: Counter[str] = field(default_factory=Counter)


def objdump_of(architecture: str) -> str | None:
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return shutil.which("objdump" if machine == architecture else f"{architecture}-linux-gnu-objdump")


def encoding(raw: list[int]) -> str:
    """VEX, EVEX or nothing, of the bytes of one x86-64 instruction."""
    first = next((byte for byte in raw if byte not in LEGACY), 0)
    return {0x62: EVEX, 0xC4: VEX, 0xC5: VEX}.get(first, "")


def weak_symbols(objdump: str, path: Path) -> list[str]:
    text = subprocess.run([objdump, "-tC", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f]+ [ !]?[wu][^\t]{5,6} (?!\*UND\*)\S+\t\S+\s+(?:\.hidden )?(.*)$", text, re.MULTILINE)


def functions(objdump: str, path: Path, x86: bool) -> list[Function]:
    """What each function of an object holds: how often each mnemonic, and on x86 each form of it."""
    text = subprocess.run([objdump, "-dwC", str(path)], capture_output=True, text=True, check=True).stdout
    return parse(text, x86)


def parse(text: str, x86: bool) -> list[Function]:
    found: list[Function] = []
    for line in text.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            found.append(Function(head[1].replace("qc::(anonymous namespace)::", "")))
            continue
        parts = line.split("\t")
        if len(parts) < 3 or not found:
            continue
        words = [word for word in parts[2].split() if not word.startswith("{")]  # {vex}
        counts, name = found[-1].counts, words[0] if words else ""
        counts[name] += 1
        if not x86:
            continue
        if how := encoding([int(byte, 16) for byte in parts[1].split()]):
            counts[how] += 1
            counts[f"{name}/{how}"] += 1
        if "%zmm" in line:
            counts[ZMM] += 1
            counts[f"{name}/{ZMM}"] += 1
    return found


# ── Checking ──


def holds(needed: str, counts: Counter[str]) -> bool:
    return any(counts[name] for name in needed.split("|"))


def check(claims: tuple[Claim, ...], objects: dict[str, list[Function]]) -> Iterator[str]:
    """What is wrong, in words; `objects`: functions by path without suffix."""
    for one in claims:
        paths = [path for path in objects if re.fullmatch(one.objects, path)]
        if not paths:
            yield f"no object is named {one.objects}"
        seen: set[str] = set()
        for path in paths:
            for function in objects[path]:
                if one.functions:
                    match = re.search(one.functions, function.name)
                    if not match or "[clone .cold]" in function.name:
                        continue
                    seen.update(group for group in match.groups() if group)
                for name in sorted(one.has):
                    if not holds(name, function.counts):
                        yield f"{path}: {function.name} has no {name.replace('|', ' or ')}"
                for name in sorted(one.lacks):
                    if function.counts[name]:
                        yield f"{path}: {function.name} has {function.counts[name]} of {name}"
        for value in one.each:
            if paths and value not in seen:
                yield f"{' '.join(paths)}: no function {one.functions} for {value}"


@dataclass
class Objects:
    """Those of a build folder, by path without suffix."""

    x86: bool
    functions: dict[str, list[Function]]
    weak: dict[str, list[str]]

    def problems(self) -> Iterator[str]:
        yield from check(X86 if self.x86 else ARM, self.functions)
        for path, names in self.weak.items():
            if re.search("avx|neon/", path):
                yield from (f"{path}: {name} is a weak symbol" for name in names)


def read(folder: Path) -> Objects:
    roots = [path for path in (folder, *folder.glob("**/qcompiler_cpu.dir")) if (path / "api.cpp.o").exists()]
    if not roots:
        raise SystemExit(f"{folder}: no objects of qcompiler_cpu, expected a build folder of runtime/")
    root = roots[0]
    x86 = (root / "avx2").exists()
    architecture = "x86_64" if x86 else "aarch64"
    objdump = objdump_of(architecture)
    if not objdump:
        print(f"no objdump for {architecture} (Debian: apt install binutils, or g++-aarch64-linux-gnu)", file=sys.stderr)
        raise SystemExit(3)
    out = Objects(x86, {}, {})
    for path in sorted(root.rglob("*.cpp.o")):
        name = str(path.relative_to(root)).removesuffix(".cpp.o")
        out.functions[name] = functions(objdump, path, x86)
        out.weak[name] = weak_symbols(objdump, path)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    wrong = 0
    for folder in parser.parse_args(arguments).folders:
        objects = read(folder)
        problems = list(objects.problems())
        wrong += len(problems)
        for problem in problems:
            print(problem)
        count = sum(len(found) for found in objects.functions.values())
        print(f"{folder}: {count} functions of {len(objects.functions)} objects, {len(problems)} of the claims about them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
