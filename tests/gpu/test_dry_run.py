"""Every op's host code as it runs on a GPU, without one: see `dry_run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

from qcompiler.ops import SPECS
from tests.gpu.dry_run import CUDA, arguments, dry
from tests.gpu.parity import sample
from tests.gpu.test_compiled import ROOT

pytest.importorskip("triton")
NAMES = ("linear_nbit", "linear_mixed", "linear_experts_nbit", "linear_vq", "embedding_nbit", "embedding_vq")
ROWS = (None, 2, 40, 300)  # those of the case, and such that each kernel of the shipped table has its turn


@pytest.mark.parametrize("name", NAMES)
def test_launches_take_tensors_of_the_gpu_and_the_host_waits_for_nothing(name: str, monkeypatch, exhaustive: bool) -> None:
    from qcompiler.gpu import implementation

    spec, kernels = SPECS[name], set()
    cases = list(spec.cases()) if exhaustive else list(sample(spec.cases()))
    with dry(monkeypatch, lambda kernel, values: kernels.add(kernel)):
        for number, case in enumerate(cases):
            for rows in ROWS:
                dtype = (torch.float16, torch.bfloat16, torch.float32)[number % 3]
                y = implementation(name)(*arguments(spec, case, rows, dtype))
                assert y.device == CUDA and y.dtype == (dtype if spec.inputs[0].name == "x" else torch.float32)
    expected = {
        "linear_nbit": {"_prepare", "_gemv", "_dot", "_dequantize", "_finish"},
        "linear_mixed": {"_prepare", "_gemv", "_dot", "_dequantize", "_finish", "_clear"},
        "linear_experts_nbit": {"_prepare", "_gemv", "_dot", "_finish"},
        "linear_vq": {"_prepare", "dot", "dequantize", "_finish"},
        "embedding_nbit": {"_rows"},
        "embedding_vq": {"embed"},
    }
    assert kernels == expected[name]


def test_a_large_prefill_has_grids_and_offsets_that_a_gpu_takes(monkeypatch) -> None:
    """A vocabulary of 262,144 and 65,536 rows: sums and outputs of more than 2^31 numbers."""
    from qcompiler.gpu import implementation
    from qcompiler.ops import layout
    from qcompiler.ops.formats import AffineFormat

    n, k, format, seen = 262_144, 1024, AffineFormat(4, 128), []
    with dry(monkeypatch, lambda kernel, values: seen.append((kernel, values))):
        empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=CUDA)  # noqa: E731
        for rows in (1, 16, 32, 65_536):
            weight = [empty(layout.codes_shape(n, k, 4), torch.uint8), empty(layout.scales_shape(n, k, format), torch.float16)]
            given = [empty((rows, k), torch.float16), *weight, *[None] * 7]
            y = implementation("linear_nbit")(*given, 4, 128, n, k, 0, 1, 0, 0.0)
            assert y.shape == (rows, n)
    assert {kernel for kernel, _ in seen} == {"_gemv", "_dot", "_dequantize", "_prepare", "_finish"}


def test_a_new_number_of_tokens_compiles_nothing_anew() -> None:
    """24 lengths of prompts on five layers: a kernel each, one more for what a split of K or its absence changes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.gpu.specializations"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["unknown"]) == 11 and not any(found["unknown"].values())  # declarations name arguments that there are
    compiled = found["compiled"]
    assert set(compiled) == {"_gemv", "_dot", "_dequantize", "_prepare", "_finish"}
    assert max(compiled.values()) <= 2, compiled  # dot has two configurations


@pytest.mark.parametrize("capturing", [False, True])
def test_words_of_entries_are_kept_outside_of_a_graphs_memory(capturing: bool, monkeypatch) -> None:
    """Made by a thread of their own, from whose allocations no graph takes; while one is captured they are the graph's."""
    from qcompiler.gpu import memory, vq_launch

    apart, threads = memory.apart, []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: threads.append(stream) or nullcontext())
    with dry(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        noted = lambda: threads.append(threading.get_ident())  # noqa: E731
        monkeypatch.setattr(memory, "apart", lambda make, place: apart(noted, place) or make())
        codebooks = torch.empty((2, 3, 2, 64), dtype=torch.int8, device=CUDA)
        first = vq_launch.entry_words(codebooks, torch.float16)
        assert first.shape == (2, 3, 64) and first.dtype == torch.int32
        assert (vq_launch.entry_words(codebooks, torch.float16) is first) is not capturing
    if capturing:
        assert not threads
    else:
        stream, thread = threads
        assert stream == "the caller's" and thread != threading.get_ident()
