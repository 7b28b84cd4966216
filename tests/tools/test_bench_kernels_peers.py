"""Peers of tools/bench/kernels: what they multiply with is what they say; without their program they say so."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from tools.bench import kernel_peers
from tools.bench.kernel_peers import weights
from tools.bench.kernels_side import TOLERANCE, Case, Side, Skipped

CASES = [Case(256, 256, rows, 1, 1, matrices=2) for rows in (1, 20)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows} rows")
@pytest.mark.parametrize("side", kernel_peers.sides("all"), ids=lambda side: side.name)
def test_a_peer_multiplies_with_the_weights_that_it_says(side: Side, case: Case) -> None:
    try:
        opened = side.open(case)
    except Skipped as reason:
        pytest.skip(str(reason))
    try:
        opened.walk()
        assert opened.error() <= TOLERANCE
        assert opened.matrices == 2 and opened.matrix_bytes * 8 / 256**2 < 9.5
    finally:
        opened.close()


@pytest.mark.parametrize("family", ["onnxruntime", "torch", "openvino"])
def test_a_program_that_is_not_installed_is_skipped(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, family, None)
    for side in kernel_peers.sides(family):
        with pytest.raises(Skipped, match="not installed"):
            side.open(CASES[0])


def test_llama_cpp_is_skipped_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench.kernel_peers import llama

    llama.ggml.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Skipped, match="not installed: llama-cpp-python"):
        llama.SIDES[0].open(CASES[0])


def test_sides_are_chosen_by_program_and_by_name() -> None:
    every = [side.name for side in kernel_peers.sides("all")]
    assert len(set(every)) == len(every) == sum(map(len, kernel_peers.FAMILIES.values()))
    assert kernel_peers.sides("none") == []
    assert [side.name for side in kernel_peers.sides("ort-int4-b32,llama-q4_0")] == ["ort-int4-b32", "llama-q4_0"]
    assert {side.family for side in kernel_peers.sides("torch,ort-int4-b32")} == {"torch", "onnxruntime"}


@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_a_chain_needs_square_matrices(family: str) -> None:
    pytest.importorskip(family)
    for side in kernel_peers.sides(family):
        with pytest.raises(Skipped, match="must be square"):
            side.open(Case(128, 256, 1, 1, 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_come_lowest_bits_first(bits: int) -> None:
    codes = weights.codes(weights.generator(0), 3, 16, bits)
    first = int.from_bytes(codes[0].tobytes(), "little")
    expected = [first >> bits * k & (1 << bits) - 1 for k in range(16)]
    assert weights.unpacked(codes, bits)[0].tolist() == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_chain_of_products_keeps_the_size_of_its_activations(bits: int) -> None:
    k = 256
    y = weights.generator(0).standard_normal((16, k), np.float32)
    for index in range(60):
        rng = weights.generator(index)
        q = weights.unpacked(weights.codes(rng, k, k, bits), bits).astype(np.float32) - 2 ** (bits - 1)
        y = y @ (q * weights.spread(weights.scales(rng, (k, k // 32), k, bits), 32)).T
    assert 0.1 < y.std() < 10
