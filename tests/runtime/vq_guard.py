"""Run as a program: the functions of vector-quantized matrices with each buffer against an inaccessible page (kernel_guard.py).

    PYTHONPATH=. python tests/runtime/vq_guard.py LIBRARY [full | canary CODES|BOOKS]

Prints "N calls". `canary` hands the library codes of one tile too few, or codebooks of one block too few: that must kill it.
"""

import dataclasses
import itertools
import pathlib
import sys

import numpy as np

from tests.runtime.kernel_guard import FULL_SHAPES
from tests.runtime.kernel_library import GuardedMemory
from tests.runtime.vq_library import VqLibrary
from tests.runtime.vq_oracle import ACTIVATIONS, FORMS, VqForm, make_weight

SHAPES = [(1, 1, 1), (15, 3, 2), (17, 31, 3), (33, 129, 1), (18, 300, 5)]


def sweep(library: VqLibrary, shapes: list[tuple[int, int, int]]) -> int:
    rng = np.random.default_rng(3)
    calls = 0
    for form, (n, k, rows) in itertools.product(FORMS, shapes):
        weight = make_weight(rng, form, n, k)
        x = rng.normal(size=(rows, k)).astype(np.float32)
        bias = rng.normal(size=n).astype(np.float32)
        indices = [0, n - 1]
        decoded = library.embedding_vq(weight, indices)
        for at_end in (True, False):
            got = library.embedding_vq(weight, indices, place=GuardedMemory(at_end))
            assert got.tobytes() == decoded.tobytes(), (str(form), n, k)
            calls += 1
        for activation, isa in itertools.product(ACTIVATIONS, library.isas):
            want = library.linear_vq(weight, x, activation, bias, isa=isa)
            for at_end in (True, False):
                got = library.linear_vq(weight, x, activation, bias, isa=isa, place=GuardedMemory(at_end))
                assert got.tobytes() == want.tobytes(), (str(form), n, k, rows, activation, isa)
                calls += 1
    return calls


def canary(library: VqLibrary, part: str) -> None:
    weight = make_weight(np.random.default_rng(0), VqForm(2, 64, 16, 128, 128), 32, 256)
    cut = {"CODES": {"codes": weight.codes[: weight.codes.size // 2]}, "BOOKS": {"codebooks": weight.codebooks[:-128]}}
    library.linear_vq(dataclasses.replace(weight, **cut[part]), np.ones((1, 256), np.float32), 2, place=GuardedMemory(True))


if __name__ == "__main__":
    mode = sys.argv[2] if len(sys.argv) > 2 else ""
    kernels = VqLibrary(pathlib.Path(sys.argv[1]))
    if mode == "canary":
        canary(kernels, sys.argv[3])
    else:
        print(sweep(kernels, FULL_SHAPES[::3] if mode == "full" else SHAPES), "calls")
