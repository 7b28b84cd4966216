"""Packed vector-quantized weights: pack and unpack are inverse, bytes lie where docs/layout.md says, sizes add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.vq import VqWeight
from qcompiler.ops import layout, vq_layout
from qcompiler.ops.formats import CENTROIDS, GROUPS, AffineFormat, VqFormat, parse_weight_format
from qcompiler.ops.linear_vq import SIDES, formats
from qcompiler.ops.packing import format_of, packed_bytes_of

KINDS = [(dim, centroids) for dim, counts in CENTROIDS.items() for centroids in counts]
FORMATS = sorted(formats(), key=lambda f: f.label)
EVERY = st.builds(
    lambda kind, sides, group: VqFormat(*kind, *sides, group),
    st.sampled_from(KINDS),
    st.sampled_from(SIDES),
    st.sampled_from(GROUPS),
)


def random_parts(rng: np.random.Generator, n: int, k: int, format: VqFormat) -> dict[str, np.ndarray]:
    blocks = format.blocks(n, k)
    return {
        "indices": rng.integers(0, format.centroids, (n, format.vectors(k)), np.uint8),
        "codebooks": rng.integers(-128, 128, (*blocks, format.centroids, format.dim), np.int8),
        "codebook_scales": rng.uniform(0.1, 2, blocks).astype(np.float16),
        "scales": rng.uniform(-0.1, 0.1, (n, format.groups(k))).astype(np.float16),
    }


def columns_of(format: VqFormat, vector: int) -> list[int]:
    """The columns of a vector, from the contract's words."""
    block, i = divmod(vector, 4)
    return [block * format.span + i + 4 * j for j in range(format.dim)]


@settings(deadline=None, max_examples=150)
@given(EVERY, st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_round_trip(format, n, k, seed):
    parts = random_parts(np.random.default_rng(seed), n, k, format)
    packed = vq_layout.pack(**parts, k=k, format=format)
    assert packed["codes"].shape == vq_layout.codes_shape(n, k, format) and packed["codes"].dtype == np.uint8
    assert packed["codebooks"].shape == vq_layout.codebooks_shape(n, k, format) and packed["codebooks"].dtype == np.int8
    assert packed["scales"].shape == vq_layout.scales_shape(n, k, format) and packed["scales"].dtype == np.float16
    np.testing.assert_array_equal(vq_layout.unpack_indices(packed["codes"], n, k, format), parts["indices"])
    np.testing.assert_array_equal(vq_layout.unpack_codebooks(packed["codebooks"]), parts["codebooks"])
    np.testing.assert_array_equal(packed["codebook_scales"], parts["codebook_scales"])
    np.testing.assert_array_equal(layout.unpack_scales(packed["scales"], n), parts["scales"])
    assert vq_layout.packed_bytes(n, k, format).keys() == {"codes", "scales", "codebooks", "padding"}
    assert sum(vq_layout.packed_bytes(n, k, format).values()) == sum(array.nbytes for array in packed.values())
    assert min(vq_layout.packed_bytes(n, k, format).values()) >= 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != (2, 32)], ids=str)
@pytest.mark.parametrize("n,k", [(5, 37), (16, 64), (33, 130), (1, 1)])
def test_indices_lie_like_the_codes_of_an_affine_weight(kind, n, k):
    """Field j of an index where the code of column j lies, over all the columns of the spans."""
    format = VqFormat(*kind, 0, 0, 0)
    bits = vq_layout.field_bits(format)
    assert bits * format.dim == format.index_bits
    indices = random_parts(np.random.default_rng(0), n, k, format)["indices"]
    fields = np.empty((n, indices.shape[1] * format.dim), np.uint8)
    for vector in range(indices.shape[1]):
        for j, column in enumerate(columns_of(format, vector)):
            fields[:, column] = indices[:, vector] >> bits * j & (1 << bits) - 1
    expected = layout.pack_codes(fields, bits)
    assert vq_layout.codes_shape(n, k, format) == layout.codes_shape(n, k, bits) == expected.shape
    np.testing.assert_array_equal(vq_layout.pack_indices(indices, k, format), expected)


def test_bytes_lie_where_the_document_says():
    rng, row, i = np.random.default_rng(1), 5, 2
    p = 4 * row + i

    def packed(dim: int, centroids: int):
        format = VqFormat(dim, centroids, 0, 0, 0)
        indices = rng.integers(0, centroids, (16, format.vectors(128)), np.uint8)
        return vq_layout.pack_indices(indices, 128, format)[0], [int(value) for value in indices[row, i::4]]

    for kind in ((2, 256), (4, 256)):
        codes, spans = packed(*kind)
        assert [codes[j, p] for j in range(len(spans))] == spans
    for kind in ((1, 16), (2, 16)):
        codes, spans = packed(*kind)
        assert codes[3, p] == spans[6] | spans[7] << 4
    codes, spans = packed(1, 4)
    assert codes[1, p] == sum(spans[4 + f] << 2 * f for f in range(4))
    for kind in ((1, 8), (2, 64)):
        codes, spans = packed(*kind)
        v = [int(codes[1, 64 * vector + p]) for vector in range(3)]
        six = [value & 63 for value in v] + [v[0] >> 6 << 4 | v[1] >> 6 << 2 | v[2] >> 6]
        if kind == (2, 64):
            assert six == spans[4:8]
        else:
            assert [part for value in six for part in (value & 7, value >> 3)] == spans[8:16]
    codes, spans = packed(2, 32)
    v = [int(codes[1, 64 * vector + p]) for vector in range(5)]
    extra = [v[0] >> 5 | (v[3] >> 5 & 3) << 3, v[1] >> 5 | (v[4] >> 5 & 3) << 3]
    extra.append(v[2] >> 5 | v[3] >> 7 << 3 | v[4] >> 7 << 4)
    assert [value & 31 for value in v] + extra == spans[8:16]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.label)
def test_values(format):
    """Weight by weight, from the definition; and the same as the solved matrix itself."""
    n, k = 37, 277
    parts = random_parts(np.random.default_rng(2), n, k, format)
    found = vq_layout.dequantize(**parts, k=k, format=format)
    assert found.shape == (n, k) and found.dtype == np.float32
    seen = np.zeros(k, int)
    for row in range(0, n, 5):
        for vector in range(format.vectors(k)):
            for j, column in enumerate(columns_of(format, vector)):
                if column >= k:
                    continue
                seen[column] += 1
                block = row // (format.block_rows or n), column // (format.block_columns or k)
                entry = parts["codebooks"][block][parts["indices"][row, vector], j]
                scale = parts["scales"][row, column // (format.group or k)]
                factor = np.float32(scale) * np.float32(parts["codebook_scales"][block])
                assert float(factor) == float(scale) * float(parts["codebook_scales"][block])  # exact
                assert found[row, column] == factor * np.float32(entry)
    assert (seen == len(range(0, n, 5))).all()
    names = ("indices", "codebooks", "codebook_scales", "scales")
    weight = VqWeight(*(torch.from_numpy(parts[name]) for name in names), columns=k, format=format)
    np.testing.assert_array_equal(weight.dequantize().numpy(), found)


# Bits per weight: codes, S, entries of codebooks, c.
TEXTBOOK = {
    "vq2d16-b16x128-g128": 2 + 0.125 + 0.125 + 16 / (16 * 128),
    "vq2d32-b16x256-g128": 2.5 + 0.125 + 0.125 + 16 / (16 * 256),
    "vq2d64-b32x256-g128": 3 + 0.125 + 0.125 + 16 / (32 * 256),
    "vq2d256-b128x256-g128": 4 + 0.125 + 0.125 + 16 / (128 * 256),
    "vq4d256-b128x256-row": 2 + 16 / 4096 + 0.25 + 16 / (128 * 256),
    "vq1d4-b16x128-g128": 2 + 0.125 + 32 / 2048 + 16 / 2048,
    "vq1d8-b16x256-g128": 3 + 0.125 + 64 / 4096 + 16 / 4096,
    "vq1d16-b16x256-g128": 4 + 0.125 + 128 / 4096 + 16 / 4096,
    "vq1d16-ballxall-g64": 4 + 0.25 + (128 + 16) / (4096 * 4096),
}


@pytest.mark.parametrize("label", TEXTBOOK)
def test_bits_per_weight(label):
    format = parse_weight_format(label)
    assert isinstance(format, VqFormat) and format.label == label
    parts = packed_bytes_of(4096, 4096, format)
    assert parts == vq_layout.packed_bytes(4096, 4096, format)
    assert parts["padding"] == 0
    assert 8 * sum(parts.values()) / 4096**2 == TEXTBOOK[label]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.label)
def test_codes_are_counted_without_their_padding(format):
    for n, k in [(1, 1), (33, 200), (704, 256)]:
        parts = vq_layout.packed_bytes(n, k, format)
        assert 0 <= parts["codes"] - n * k * format.index_bits / format.dim / 8 < 1
        assert parts["scales"] == 2 * n * format.groups(k)
        down, across = format.blocks(n, k)
        assert parts["codebooks"] == down * across * (format.dim * format.centroids + 2)


def test_formats_are_read_back_from_attributes():
    affine = AffineFormat(4, 32, symmetric=False)
    assert format_of({"bits": 4, "group": 32}, {"codes", "zeros"}) == affine
    assert packed_bytes_of(33, 200, affine) == layout.packed_bytes(33, 200, affine)
    for format in FORMATS:
        fields = ("dim", "centroids", "block_rows", "block_columns", "group")
        assert format_of({name: getattr(format, name) for name in fields}) == format
    with pytest.raises(ValueError, match="64 centroids of 4 columns have no packed index"):
        format_of({"dim": 4, "centroids": 64, "block_rows": 0, "block_columns": 0, "group": 0})


REFUSED = {
    "an index beyond the codebook": ("indices", lambda a: np.full_like(a, 32), r"lie in \[0, 31\], found \[32, 32\]"),
    "a negative index": ("indices", lambda a: a.astype(np.int64) - 33, r"lie in \[0, 31\], found \[-33"),
    "a vector missing": ("indices", lambda a: a[:, 1:], r"indices of a 20 x 130 matrix .* \[20, 68\], found \[20, 67\]"),
    "an entry beyond int8": ("codebooks", lambda a: a.astype(np.int64) + 300, r"lie in \[-128, 127\], found"),
    "a fraction": ("codebooks", lambda a: a / 2 + 0.25, "whole numbers"),
    "an entry that is NaN": ("codebooks", lambda a: a * np.nan, "whole numbers"),
    "tables, not entries": ("codebooks", lambda a: a.swapaxes(2, 3), r"codebooks of .* \[2, 2, 32, 2\], found \[2, 2, 2, 32\]"),
    "a codebook missing": ("codebooks", lambda a: a[:1], r"are \[2, 2, 32, 2\], found \[1, 2, 32, 2\]"),
    "a codebook's scale missing": ("codebook_scales", lambda a: a[:, :1], r"scales of codebooks .* \[2, 2\], found \[2, 1\]"),
    "a codebook's scale that is NaN": ("codebook_scales", lambda a: a * np.nan, "scales of codebooks are finite.* found nan"),
    "a scale missing": ("scales", lambda a: a[:, :1], r"scales of a 20 x 130 .* \[20, 2\], found \[20, 1\]"),
    "a scale that is NaN": ("scales", lambda a: a * np.nan, "^scales are finite and at most 65504, found nan"),
    "a scale beyond float16": ("scales", lambda a: a * 0.0 + np.float32(1e6), "at most 65504, found 1e[+]06"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_is_refused(case):
    name, change, message = REFUSED[case]
    format = VqFormat(2, 32, 16, 128, 128)
    parts = random_parts(np.random.default_rng(3), 20, 130, format)
    vq_layout.pack(**parts, k=130, format=format)
    parts[name] = change(parts[name])
    with pytest.raises(ValueError, match=message):
        vq_layout.pack(**parts, k=130, format=format)


def test_codes_of_another_size_are_refused():
    format = VqFormat(2, 64, 0, 0, 0)
    codes = np.zeros(vq_layout.codes_shape(16, 64, format), np.uint8)
    with pytest.raises(ValueError, match=r"a 16 x 65 matrix in vq2d64-ballxall-row are \[1, 3, 192\], found \[1, 2, 192\]"):
        vq_layout.unpack_indices(codes, 16, 65, format)
