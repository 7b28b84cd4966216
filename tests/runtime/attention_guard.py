"""Run as a program: attention with each buffer against an inaccessible page. A read or write too far kills it.

    PYTHONPATH=. python tests/runtime/attention_guard.py LIBRARY [canary]

Prints "N calls". `canary` says that the cache holds one position more than it does: that must kill it.
"""

import itertools
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.runtime.attention_library import call, make_attention
from tests.runtime.kernel_library import GuardedMemory, Library

HEADS = (1, 5, 16, 20, 64, 100)
SHAPES = ((0, 1), (1, 1), (127, 1), (130, 2), (0, 13), (120, 20))


def sweep(library: Library) -> int:
    calls = 0
    for number, (head, (past, rows)) in enumerate(itertools.product(HEADS, SHAPES)):
        rng = np.random.default_rng(number)
        a = make_attention(
            rng, kv_heads=2, group=2, head=head, past=past, rows=rows, room=0, rotary=head // 2 * 2,
            own_positions=number % 2 == 0, bias_heads=(0, 1, 4)[number % 3], window=(0, 7)[number % 2],
            interleaved=number % 4 == 3,
        )  # fmt: skip
        want = call(library, a.with_own_cache())
        for isa in library.isas:
            for at_end in (True, False):
                got = call(library, a.with_own_cache(), isa=isa, place=GuardedMemory(at_end))
                assert got.tobytes() == want.tobytes(), (head, past, rows, isa)
                calls += 1
    return calls


def canary(library: Library) -> None:
    a = make_attention(np.random.default_rng(0), kv_heads=1, head=1024, past=7, rows=1, room=0)
    call(library, a, place=GuardedMemory(True), past=8, capacity=9, past_capacity=9)


if __name__ == "__main__":
    kernels = Library(pathlib.Path(sys.argv[1]))
    if sys.argv[2:] == ["canary"]:
        canary(kernels)
    else:
        print(sweep(kernels), "calls")
