"""Shapes, their bits, and what of them is packed; stored scales and codebooks."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics.gptvq import vq_nearest
from qcompiler.numerics.vq import VqWeight
from qcompiler.numerics.vq_codec import Codec, log_scales
from qcompiler.numerics.vq_shape import VqGeneral, VqShape
from qcompiler.ops.formats import VqFormat

FORMATS = ["vq2d16-b16x128-g128", "vq2d64-b32x256-g128", "vq4d256-b128x256-row", "vq1d8-b16x256-g64", "vq2d32-ballxall-g32"]


@pytest.mark.parametrize("label", FORMATS)
def test_formats_are_shapes_and_back(label):
    format = VqFormat.parse(label)
    shape = VqShape.of(format)
    assert shape.packed() == format
    assert (shape.groups(200), shape.vectors(200), shape.blocks(50, 200)) == (
        format.groups(200), format.vectors(200), format.blocks(50, 200),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codebooks": "int4"}, "codebooks 'int4' have no packed form"),
        ({"codebooks": "fp16"}, "codebooks 'fp16' have no packed form"),
        ({"scales": "log4"}, "scales 'log4' have no packed form"),
        ({"spread": False}, "side by side have no packed form"),
        ({"rows": 8}, "codebook's rows must be a multiple of 16"),
        ({"columns": 64}, "codebook's columns must be a multiple of 128"),
        ({"group": 256}, "group must be one of"),
        ({"centroids": 24}, "24 centroids of 2 columns have no packed index"),
        ({"dim": 8}, "vectors of 8 columns have no packed form"),
    ],
)
def test_what_has_no_packed_form_is_named(change, reason):
    shape = VqShape(**{"dim": 2, "centroids": 16, "rows": 16, "columns": 256, "group": 64, **change})
    with pytest.raises(ValueError, match=reason):
        shape.packed()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 0}, "dim is 0, expected at least 1"),
        ({"centroids": 2**17}, "no index has more than 16 bits"),
        ({"rows": -1}, "rows is -1"),
        ({"columns": 12}, "codebook's columns, 12, would cut vectors: expected a multiple of 8"),
        ({"group": 12}, "group, 12, would cut vectors"),
        ({"group": 96}, "96 columns does not divide a codebook's 256"),
        ({"scales": "fp8"}, "scales 'fp8' and codebooks 'int8' are not known"),
        ({"codebooks": "svd"}, "dim must be 1"),
        ({"scales": "none"}, "'none' have no groups of 64"),
    ],
)
def test_shapes_that_cannot_be(change, reason):
    with pytest.raises(ValueError, match=reason):
        VqShape(**{"dim": 2, "centroids": 16, "rows": 16, "columns": 256, "group": 64, **change})


def test_the_rates_of_the_paper():
    """log2(K) / d + K d 8 / l, and 16 / l for the codebook's own scale."""
    for shape, bits in (
        (VqShape(1, 4, 1, 256, scales="none"), 2.125), (VqShape(2, 16, 8, 256, scales="none"), 2.125),
        (VqShape(4, 256, 256, 256, scales="none"), 2.125), (VqShape(2, 64, 32, 256, scales="none"), 3.125),
        (VqShape(2, 256, 128, 256, scales="none"), 4.125), (VqShape(2, 16, 4, 256, scales="none"), 2.25),
    ):  # fmt: skip
        assert shape.bits(4096, 4096) == pytest.approx(bits + 16 / (shape.rows * 256), abs=1e-12)
    scaled = VqShape(2, 64, 64, 256, 64, "log4")
    assert scaled.bits(4096, 4096) == pytest.approx(3 + 1 / 16 + 16 / 16384 + 4 / 64 + 32 / 64 / 4096, abs=1e-12)


@pytest.mark.parametrize("label", FORMATS)
def test_bits_are_those_of_the_stored_tensors(label):
    format = VqFormat.parse(label)
    weight = vq_nearest(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), format)
    assert isinstance(weight, VqWeight)
    stored = weight.indices.numel() * format.index_bits + 8 * weight.codebooks.numel()
    stored += 16 * (weight.codebook_scales.numel() + weight.scales.numel())
    assert VqShape.of(format).bits(64, 256) == stored / (64 * 256)


def test_members():
    assert VqShape(2, 4, 1, 0).members(10).tolist() == [
        [0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15],
    ]  # fmt: skip
    assert VqShape(2, 4, 1, 0, spread=False).members(5).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("label", FORMATS)
def test_the_general_form_decodes_as_the_packed_one(label):
    format = VqFormat.parse(label)
    weight = vq_nearest(torch.randn(40, 300, generator=torch.Generator().manual_seed(0)), format)
    values = weight.codebooks.float() * weight.codebook_scales.float()[..., None, None]
    general = VqGeneral(weight.indices.int(), values, weight.scales.float(), 300, VqShape.of(format))
    assert torch.equal(general.dequantize(), weight.dequantize())
    assert torch.equal(general.dequantize(slice(7, 21)), weight.dequantize(slice(7, 21)))


# ---- what is stored


def test_logarithmic_scales_are_within_half_a_step():
    scales = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(4).exp2()
    scales[1, 4] = 0
    found = log_scales(scales)
    assert found[1, 4] == 0 and (found > 0).sum() == 149
    logs, near = scales.clamp(min=1).log2(), found.clamp(min=1).log2()
    step = (logs.amax(1) - torch.where(scales > 0, logs, torch.inf).amin(1)) / 15
    assert ((logs - near).abs() <= step[:, None] / 2 + 1e-12).all()
    assert all(len(row[row > 0].unique()) <= 16 for row in found)
    torch.testing.assert_close(log_scales(found), found)
    assert torch.equal(log_scales(torch.zeros(2, 5)), torch.zeros(2, 5))
    torch.testing.assert_close(log_scales(torch.full((2, 5), 3.0)), torch.full((2, 5), 3.0))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_codebooks_use_all_of_their_bits(kind, bits):
    codec = Codec(VqShape(2, 16, 16, 256, codebooks=kind), 1.0, 2.0**-3)
    entries = torch.randn(9, 16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entries[0] = entries[0].abs().neg()
    codes, steps = codec.codebooks(entries)
    top = 2 ** (bits - 1)
    assert torch.equal(codes, codes.round()) and codes.min() == -top and codes.max() == top - 1
    assert (codes.flatten(1).abs().amax(1) >= top - 1).all()
    assert torch.equal((steps / 8).half().double() * 8, steps)
    errors = (codes * steps[:, None, None] - entries).abs()
    assert kind == "int4" or (errors <= steps[:, None, None] * 0.51).all()
    assert torch.equal(codec.codebooks(torch.zeros(1, 16, 2))[0], torch.zeros(1, 16, 2))


def test_the_unit_is_shared_out_between_both_scales():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for factor in (1e-6, 1e-3, 1.0, 1e3):
        for label in ("vq2d16-b16x128-g128", "vq4d256-ballx128-row"):
            found = vq_nearest(weight * factor, VqFormat.parse(label))
            error = (found.dequantize() - weight * factor).square().sum() / (weight * factor).square().sum()
            assert error < 0.2 and (found.scales.abs() > 6e-5).all() and (found.codebook_scales > 6e-5).all()
