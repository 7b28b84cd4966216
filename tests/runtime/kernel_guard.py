"""Run as a program: every kernel with each buffer against an inaccessible page. A read or write too far kills it.

    PYTHONPATH=. python tests/runtime/kernel_guard.py LIBRARY [full | edges | canary]

Prints "N calls". `canary` hands the library a codes buffer that is one tile too short: that must kill it, or the
harness proves nothing.
"""

import dataclasses
import itertools
import pathlib
import sys

import numpy as np

from tests.runtime.kernel_library import Edges, GuardedMemory, Library
from tests.runtime.kernel_oracle import FORMATS, make_weight

SHAPES = [(1, 1, 1), (15, 3, 2), (17, 31, 3), (16, 33, 1), (1, 127, 4), (18, 129, 5), (33, 1000, 1)]
FULL_K = (1, 3, 4, 31, 32, 33, 127, 128, 129, 300)
FULL_SHAPES = list(itertools.product((1, 15, 16, 17, 40), FULL_K, (1, 2, 3, 7, 13)))


def sweep(library: Library, shapes: list[tuple[int, int, int]]) -> int:
    rng = np.random.default_rng(3)
    calls = 0
    for form in FORMATS:
        for n, k, rows in shapes:
            weight = make_weight(rng, n, k, form.bits, form.group, form.asymmetric)
            x = rng.normal(size=(rows, k)).astype(np.float32)
            bias = rng.normal(size=n).astype(np.float32)
            indices = [0, n - 1]
            row = library.embedding(weight, indices)
            columns = np.unique([0, k // 2, k - 1])
            outliers = rng.normal(size=(n, len(columns))).astype(np.float16)
            both = library.linear(weight, x, form.activation, bias, columns=columns, outliers=outliers)
            for isa in library.isas:
                want = library.linear(weight, x, form.activation, bias, isa=isa)
                for at_end in (True, False):
                    got = library.linear(weight, x, form.activation, bias, isa=isa, place=GuardedMemory(at_end))
                    assert got.tobytes() == want.tobytes(), (str(form), n, k, rows, isa)
                    got = library.embedding(weight, indices, isa=isa, place=GuardedMemory(at_end))
                    assert got.tobytes() == row.tobytes(), (str(form), n, k, isa)
                    got = library.linear(
                        weight, x, form.activation, bias, columns=columns, outliers=outliers, isa=isa, place=GuardedMemory(at_end)
                    )  # fmt: skip
                    assert got.tobytes() == both.tobytes(), (str(form), n, k, rows, isa, "mixed")
                    calls += 3
    return calls


def sweep_edges(library: Library) -> int:
    """Norm, gate and residual, each against the page."""
    rng = np.random.default_rng(4)
    calls = 0
    for n, k, rows in [(32, 1, 1), (64, 3, 2), (32, 31, 3), (96, 33, 1), (32, 127, 14), (64, 129, 5), (160, 1000, 1)]:
        weight = make_weight(rng, n, k, 4, 32, True)
        x = rng.normal(size=(rows, k)).astype(np.float32)
        for gate in range(4):
            residual = rng.normal(size=(rows, n // 2 if gate else n)).astype(np.float32)
            edges = Edges(rng.normal(size=k).astype(np.float32), 1e-5, residual, gate)
            for isa in library.isas:
                want = library.linear(weight, x, 2, edges=edges, isa=isa)
                for at_end in (True, False):
                    got = library.linear(weight, x, 2, edges=edges, isa=isa, place=GuardedMemory(at_end))
                    assert got.tobytes() == want.tobytes(), (n, k, rows, gate, isa)
                    calls += 1
    return calls


def canary(library: Library) -> None:
    weight = make_weight(np.random.default_rng(0), 32, 256, 4, 32, False)
    short = dataclasses.replace(weight, codes=weight.codes[: weight.codes.size // 2])
    library.linear(short, np.ones((1, 256), np.float32), 2, place=GuardedMemory(True))


if __name__ == "__main__":
    mode = sys.argv[2] if len(sys.argv) > 2 else ""
    kernels = Library(pathlib.Path(sys.argv[1]))
    if mode == "canary":
        canary(kernels)
    elif mode == "edges":
        print(sweep_edges(kernels), "calls")
    else:
        print(sweep(kernels, FULL_SHAPES if mode == "full" else SHAPES), "calls")
