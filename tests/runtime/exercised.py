"""Which instruction sets ran which ops in this test run, and which of them must (kernel_report.py tells)."""

from __future__ import annotations

import os
import platform

MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
NEON = ("neon-i8mm", "neon-dotprod")
# All that is compiled for an architecture, whether or not this CPU executes it; best first.
COMPILED = {
    "x86_64": ("avx512vbmi", "avx512vnni", "avxvnni", "avx512vl", "avx2", "generic"),
    "aarch64": (*NEON, "generic"),
}.get(MACHINE, ("generic",))
# Each has a kernel, or kernels of its own in each instruction set. Decoding of rows has one version for all.
OPS = tuple(
    f"{op}-{activation}{edges}"
    for op, kinds in {"linear": ("", "-edges"), "mixed": ("",), "experts": ("",), "vq": ("", "-edges")}.items()
    for edges in kinds
    for activation in ("float", "int8")
)
DECODING = ("embedding", "embedding-vq")

RAN: set[tuple[str, str]] = set()


def record(isa: str, op: str, activation: int | None = None, edges: bool = False) -> None:
    """`activation`: that of qc_activation, where the op has one."""
    kind = "" if activation is None else "-int8" if activation else "-float"
    RAN.add((isa, op + kind + "-edges" * edges))


def record_output(text: str) -> None:
    """The lines "exercised ISA: OP OP ..." of compare_kernels."""
    for line in text.splitlines():
        if line.startswith("exercised "):
            isa, ops = line.removeprefix("exercised ").split(":")
            RAN.update((isa, op) for op in ops.split())


def requested() -> list[str]:
    """Names in environment variable QCOMPILER_EXPECT."""
    return [name for name in os.environ.get("QCOMPILER_EXPECT", "").split(",") if name]


def kernels(isa: str) -> list[tuple[str, str]]:
    return [(isa, op) for op in (OPS + DECODING if isa == "generic" else OPS)]


def expected(executable: list[str]) -> list[tuple[str, str]]:
    """The kernels of what the CPU executes, and of each instruction set whose name begins with one that is requested."""
    named = [isa for isa in dict.fromkeys((*COMPILED, *NEON)) if any(isa.startswith(name) for name in requested())]
    return [kernel for isa in dict.fromkeys((*executable, *named)) for kernel in kernels(isa)]
