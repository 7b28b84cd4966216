"""The packed layout: pack and unpack are inverse, bytes lie where docs/layout.md says, sizes add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.ops import layout
from qcompiler.ops.formats import BITS, GROUPS, AffineFormat


def random_codes(rng, n, k, bits):
    return rng.integers(-128, 128, (n, k)) if bits == 8 else rng.integers(0, 2**bits, (n, k))


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_round_trip(bits, n, k, seed):
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, n, k, bits)
    packed = layout.pack_codes(codes, bits)
    assert packed.shape == layout.codes_shape(n, k, bits) and packed.dtype == np.uint8
    np.testing.assert_array_equal(layout.unpack_codes(packed, n, k, bits), codes)
    zeros = random_codes(rng, n, 1 + k // 32, bits)
    np.testing.assert_array_equal(layout.unpack_zeros(layout.pack_zeros(zeros, bits), n, bits), zeros)
    scales = rng.standard_normal((n, 1 + k // 32)).astype(np.float16)
    np.testing.assert_array_equal(layout.unpack_scales(layout.pack_scales(scales), n), scales)


def test_bytes_lie_where_the_document_says():
    n, k = 16, 32
    codes = np.arange(n * k).reshape(n, k) % 16
    int4 = layout.pack_codes(codes, 4)
    r, i, j = 5, 2, 3  # row, position, unit
    assert int4[0, j, 4 * r + i] == codes[r, 8 * j + i] | codes[r, 8 * j + 4 + i] << 4
    int2 = layout.pack_codes(codes % 4, 2)
    assert int2[0, 1, 4 * r + i] == sum((codes[r, 16 + 4 * f + i] % 4) << 2 * f for f in range(4))
    int8 = layout.pack_codes(codes - 8, 8)
    assert int8[0, j, 4 * r + i].view(np.int8) == codes[r, 4 * j + i] - 8
    int3 = layout.pack_codes(codes % 8, 3)
    pair = lambda m: (codes[r, 8 * m + i] % 8) | (codes[r, 8 * m + 4 + i] % 8) << 3  # noqa: E731
    p = 4 * r + i
    for vector, shift in ((0, 4), (1, 2), (2, 0)):
        assert int3[0, 0, 64 * vector + p] == pair(vector) | (pair(3) >> shift & 3) << 6


def test_padding_decodes_to_zero():
    for bits in BITS:
        tiles, units, _ = layout.codes_shape(3, 5, bits)
        packed = layout.pack_codes(random_codes(np.random.default_rng(0), 3, 5, bits), bits)
        whole = layout.unpack_codes(packed, 16 * tiles, layout.UNIT_K[bits] * units, bits)
        center = AffineFormat(bits, 0).center
        assert (whole[3:] == center).all() and (whole[:, 5:] == center).all()


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"codes of 3 bits lie in \[0, 7\], found \[0, 8\]"):
        layout.pack_codes(np.array([[0, 8]]), 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_add_up(bits, group, symmetric):
    format = AffineFormat(bits, group, symmetric)
    for n, k in [(1, 1), (16, 128), (33, 200), (704, 256)]:
        stored = np.prod(layout.codes_shape(n, k, bits)) + 2 * np.prod(layout.scales_shape(n, k, format))
        if not symmetric:
            stored += np.prod(layout.zeros_shape(n, k, format))
        parts = layout.packed_bytes(n, k, format)
        assert sum(parts.values()) == stored
        assert parts["padding"] >= 0
        assert 8 * parts["codes"] - n * k * bits in range(8)
    whole = layout.packed_bytes(256, 1024, format)
    expected = bits + (16 + (0 if symmetric else bits)) / (group or 1024)
    assert 8 * sum(whole.values()) / (256 * 1024) == pytest.approx(expected)


def test_format_labels_round_trip():
    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                format = AffineFormat(bits, group, symmetric)
                assert AffineFormat.parse(format.label) == format
    with pytest.raises(ValueError, match="expected e.g. 'int4-g32-sym'"):
        AffineFormat.parse("int4_32")
