"""Every case of every op on the kernels that compute it: which runs there are, in parts of one op and one format.

With the options of a plain run a case runs in each dtype with the kernel and the configuration that the shipped dispatch table
has for it, and every kernel that computes a format and a kind of activations runs one case of them, in small blocks and with
K in parts; kernels and dtypes take turns. With --slow each case runs on each kernel in each dtype: on a GPU some thousands of
kernels to compile, where a plain run has some three thousand already.

The modules `test_every_case_*` take the tests from here and have a list PARTS each, so that processes share them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from qcompiler.gpu import dispatch
from qcompiler.gpu.dequantize import INT_MM_ROWS
from qcompiler.ops import SPECS
from qcompiler.ops.formats import Activation
from qcompiler.ops.spec import Case
from tests.gpu.parity import CUDA, DTYPES, check

# Blocks such that a case has several of them; K is split.
_GEMV = {"block_n": 64, "block_k": 128, "split": 2, "warps": 4, "stages": 2}
_DOT = {"block_m": 16, "block_n": 64, "block_k": 128, "split": 2, "warps": 4, "stages": 2}
CONFIGS = {
    "gemv": _GEMV,
    "gemv_gather": _GEMV,
    "dot": _DOT,
    "dot_gather": {**_DOT, "split": 0},
    "dot_narrow": _DOT,
    "matmul": {"chunk": 4096},
    "int_mm": {"chunk": 4096},
    "rows": {"block_k": 128, "warps": 4},
}
VQ = ("gemv", "gemv_gather", "dot", "dot_gather", "dot_narrow", "matmul")
GEMV_ROWS = 1 << 31 if CUDA else 3  # a program each, and an interpreted program is slow


class Part(NamedTuple):
    """The cases of one op whose label begins with a format."""

    op: str
    format: str


class Run(NamedTuple):
    """A case on a kernel in `CONFIGS`' configuration, or on what the shipped table names (None)."""

    case: Case
    kernel: str | None
    dtype: torch.dtype


@functools.cache
def cases(op: str) -> tuple[Case, ...]:
    return tuple(SPECS[op].cases())


def format_of(case: Case) -> str:
    return case.label.split(" ")[0]


def parts(*ops: str) -> list[Part]:
    """All parts of some ops."""
    return list(dict.fromkeys(Part(op, format_of(case)) for op in ops for case in cases(op)))


def rows_of(case: Case) -> int:
    return case.inputs["x"].size // case.attributes["k"]


def kernels(op: str, case: Case) -> list[str]:
    """Those that compute the case (and in time, interpreted)."""
    if op.startswith("embedding_"):
        return ["rows"]
    if op == "linear_vq":
        return list(VQ)
    kind, rows, attributes = case.attributes["activation"], rows_of(case), case.attributes
    found = ["dot"] + ["gemv"] * (rows <= GEMV_ROWS)
    if op != "linear_experts_nbit":
        found += ["matmul"] * (kind == Activation.FLOAT)
        whole = attributes["bits"] == 8 and attributes["group"] == 0 and rows >= INT_MM_ROWS
        found += ["int_mm"] * (whole and kind in (Activation.INT8_TOKEN, Activation.INT8_STATIC))
    return found


def _dtypes(case: Case) -> tuple[torch.dtype, ...]:
    return DTYPES if "x" in case.inputs else DTYPES[:1]  # an embedding has no x


def _kind(case: Case) -> int:
    return case.attributes.get("activation", 0)


def as_shipped(part: Part) -> Iterator[Run]:
    """Each case in each dtype."""
    for case in cases(part.op):
        if format_of(case) == part.format:
            yield from (Run(case, None, dtype) for dtype in _dtypes(case))


def on_kernels(part: Part, everything: bool) -> Iterator[Run]:
    """Each case on each of its kernels in each dtype, or for each kind of activations and kernel one case with rows."""
    mine = [case for case in cases(part.op) if format_of(case) == part.format]
    able: dict[tuple[int, str], list[Case]] = {}
    for case in mine:
        for kernel in kernels(part.op, case):
            able.setdefault((_kind(case), kernel), []).append(case)
    turn = parts(part.op).index(part)
    for number, ((_, kernel), taken) in enumerate(able.items()):
        if everything:
            yield from (Run(case, kernel, dtype) for case in taken for dtype in _dtypes(case))
            continue
        full = [case for case in taken if all(value is None or value.size for value in case.inputs.values())] or taken
        case = full[(turn + number) % len(full)]
        yield Run(case, kernel, _dtypes(case)[(turn + number) % len(_dtypes(case))])


def check_run(op: str, run: Run) -> None:
    """Compares with the reference (`parity.check`)."""
    with dispatch.forced(run.kernel, **CONFIGS[run.kernel]) if run.kernel else nullcontext():
        check(SPECS[op], run.case, run.dtype)


def test_every_case_as_the_shipped_table_runs_it(part: Part) -> None:
    for run in as_shipped(part):
        check_run(part.op, run)


def test_every_kernel_of_the_format(part: Part) -> None:
    for run in on_kernels(part, everything=False):
        check_run(part.op, run)


@pytest.mark.slow
def test_every_case_on_every_kernel(part: Part) -> None:
    for run in on_kernels(part, everything=True):
        check_run(part.op, run)
