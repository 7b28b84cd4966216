"""Tables of pairs: two scalar entries to a look-up, where they are worth their memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qcompiler.gpu import vq_launch
from qcompiler.ops import SPECS, vq_layout
from qcompiler.ops.formats import CENTROIDS, VqFormat
from qcompiler.ops.linear_vq import WEIGHT_INPUTS, random_weight, unpack
from qcompiler.ops.spec import Case
from tests.gpu import every_case
from tests.gpu.parity import DEVICE, run

SCALARS = CENTROIDS[1]


def weight_of(format: VqFormat, n: int, k: int) -> vq_launch.Weight:
    packed, _ = random_weight(np.random.default_rng(0), n, k, format)
    return vq_launch.Weight(*(torch.from_numpy(packed[i.name]).to(DEVICE) for i in WEIGHT_INPUTS), format, n, k)


@pytest.mark.parametrize("k", [128, 200, 37])
@pytest.mark.parametrize("centroids", SCALARS)
def test_the_bytes_of_scalar_indices_are_those_of_pairs(centroids: int, k: int) -> None:
    scalar, pairs = VqFormat(1, centroids, 0, 0, 32), VqFormat(2, centroids**2, 0, 0, 32)
    n, spans = 40, -(-k // 8)
    whole = np.zeros((n, spans * 8), np.uint8)
    whole[:, :k] = np.random.default_rng(k).integers(0, centroids, (n, k))
    columns = whole.reshape(n, spans, 2, 4)  # a span of pairs: column 4j + i is number j of vector i
    index = (columns[:, :, 0] + centroids * columns[:, :, 1]).reshape(n, spans * 4)
    one = vq_layout.pack_indices(whole[:, : scalar.vectors(k)], k, scalar)
    np.testing.assert_array_equal(one, vq_layout.pack_indices(index, k, pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_word_holds_the_entry_of_the_low_half_first(dtype: torch.dtype) -> None:
    codebooks = torch.from_numpy(np.random.default_rng(1).integers(-128, 127, (3, 2, 1, 8), np.int8))
    numbers = torch.int8 if dtype == torch.float32 else dtype
    words = vq_launch.entry_words(codebooks, dtype, paired=True)
    found = words.contiguous().view(torch.uint8).view(numbers).view(3, 2, 8, 8, 2).float()
    entries = codebooks[:, :, 0].float()
    assert torch.equal(found[..., 0], entries[:, :, None, :].expand(3, 2, 8, 8))
    assert torch.equal(found[..., 1], entries[:, :, :, None].expand(3, 2, 8, 8))
    assert vq_launch.entry_words(codebooks, dtype, paired=True) is words
    assert vq_launch.entry_words(codebooks, dtype).shape == (3, 2, 8)
    codebooks += 1
    assert not torch.equal(vq_launch.entry_words(codebooks, dtype, paired=True), words)


@pytest.mark.parametrize("centroids", SCALARS)
def test_a_table_takes_a_fourth_of_the_memory_of_the_indices_at_most(centroids: int) -> None:
    bits = centroids.bit_length() - 1
    for number, dtype in ((1, torch.float32), (1, torch.int8), (2, torch.float16), (2, torch.bfloat16)):
        fits = 16 * 128
        while fits * bits // 8 < 4 * 2 * number * centroids**2:
            fits *= 2
        for weights, expected in ((fits, True), (fits // 2, False)):
            if weights < 16 * 128:
                continue
            format = VqFormat(1, centroids, 16, weights // 16, 128)
            weight = weight_of(format, 32, weights // 16 * 2)
            paired = weight.in_pairs(dtype)
            assert paired.paired == expected, (format.label, dtype)
            assert paired.format == (replace(format, dim=2, centroids=centroids**2) if expected else format)
            table = paired.tensors(dtype)[1]
            if expected:
                assert 4 * table.numel() * table.element_size() <= weight.codes.numel()


def test_what_the_rule_says_of_the_named_formats() -> None:
    from qcompiler.recipe.schema import VQ_FORMATS

    paired: dict[str, tuple[bool, bool]] = {}
    for name, label in VQ_FORMATS.items():
        weight = weight_of(VqFormat.parse(label), 128, 512)
        paired[name] = weight.in_pairs(torch.float16).paired, weight.in_pairs(torch.int8).paired
    scalar = {"vq1d-2": (True, True), "vq1d-3": (True, True), "vq1d-4": (False, True), "nf4": (True, True), "fp4": (True, True)}
    assert paired == dict.fromkeys(VQ_FORMATS, (False, False)) | scalar


def test_the_cases_have_weights_with_and_without() -> None:
    dtypes, met = (torch.float32, torch.float16), set()
    for case in every_case.cases("linear_vq"):
        attributes = case.attributes
        if attributes["dim"] == 1:
            sizes = [attributes[name] for name in ("centroids", "block_rows", "block_columns", "group")]
            tensors = [torch.from_numpy(case.inputs[i.name]) for i in WEIGHT_INPUTS]
            weight = vq_launch.Weight(*tensors, VqFormat(1, *sizes), attributes["n"], attributes["k"])
            met |= {(attributes["centroids"], dtype, weight.in_pairs(dtype).paired) for dtype in dtypes}
    wanted = {(centroids, dtype, paired) for centroids in SCALARS for dtype in dtypes for paired in (False, True)}
    # A codebook of 4 entries has a table that is small beside the indices of the least block.
    assert met >= wanted - {(4, dtype, False) for dtype in dtypes}


@pytest.mark.parametrize("blocks", [(0, 0), (16, 128)])
@pytest.mark.parametrize("centroids", SCALARS)
def test_the_identity_gives_the_dequantized_weight_to_the_bit(centroids: int, blocks: tuple[int, int]) -> None:
    """Of the units, of the groups and of the codebooks the last ones are short."""
    from qcompiler.gpu import dispatch

    format = VqFormat(1, centroids, *blocks, 32)
    packed, attributes = random_weight(np.random.default_rng(3), 40, 138, format)
    assert weight_of(format, 40, 138).in_pairs(torch.float32).paired == (blocks == (0, 0) or centroids < 8)
    x = np.eye(138, dtype=np.float32)
    case = Case(format.label, {"x": x, **packed, "bias": None}, {**attributes, "activation": 0})
    levels, factors = unpack(case.inputs, case.attributes)
    wide = {**every_case.CONFIGS["dot"], "block_m": 256, "split": 1}
    for kernel, config in (("dot", wide), ("matmul", {"chunk": 0})):
        with dispatch.forced(kernel, **config):
            found = run(SPECS["linear_vq"], case).cpu().numpy()
        np.testing.assert_array_equal(found.T, factors * levels, err_msg=kernel)
    few = replace(case, inputs={**case.inputs, "x": x[[0, 5, 137]]})
    with dispatch.forced("gemv", **every_case.CONFIGS["gemv"]):
        np.testing.assert_array_equal(run(SPECS["linear_vq"], few).cpu().numpy(), (factors * levels)[:, [0, 5, 137]].T)
