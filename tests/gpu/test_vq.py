"""linear_vq and embedding_vq on a GPU or interpreted: to the bit where arithmetic allows, and what is refused.

Parity: `tests/gpu/every_case.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qcompiler.errors import UnsupportedError
from qcompiler.ops import SPECS
from qcompiler.ops.formats import CENTROIDS, Activation, VqFormat
from qcompiler.ops.linear_vq import random_weight, unpack
from qcompiler.ops.spec import Case
from tests.gpu import every_case, parity

LINEAR, EMBEDDING = SPECS["linear_vq"], SPECS["embedding_vq"]
ROWS = every_case.cases("embedding_vq")
# On a GPU nothing is slow.
slow = (lambda test: test) if parity.CUDA else pytest.mark.slow


def forced(kernel: str, **changes: int):
    from qcompiler.gpu import dispatch

    return dispatch.forced(kernel, **{**every_case.CONFIGS[kernel], **changes})


def one_case(format: VqFormat, rows: int, n: int, k: int, activation: Activation = Activation.FLOAT) -> Case:
    rng = np.random.default_rng(3)
    packed, attributes = random_weight(rng, n, k, format)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    return Case(format.label, {"x": x, **packed, "bias": None}, {**attributes, "activation": int(activation)})


FORMATS = [VqFormat(dim, count, 32, 128, 32) for dim, counts in CENTROIDS.items() for count in counts]


def check_identity(format: VqFormat, kernel: str) -> None:
    """Of the units, of the groups and of the codebooks the last ones are short."""
    case = one_case(format, 1, 40, 136)
    case = replace(case, inputs={**case.inputs, "x": np.eye(136, dtype=np.float32)})
    levels, factors = unpack(case.inputs, case.attributes)
    with forced(kernel, **({} if kernel == "matmul" else {"block_m": 256, "split": 1})):
        found = parity.run(LINEAR, case).cpu().numpy()
    np.testing.assert_array_equal(found.T, factors * levels, err_msg=f"{format.label} {kernel}")


@pytest.mark.parametrize("number", range(len(FORMATS)), ids=lambda i: FORMATS[i].label)
def test_the_identity_gives_the_dequantized_weight_to_the_bit(number):
    check_identity(FORMATS[number], ("matmul", "dot", "dot_gather")[number % 3])


@slow
def test_the_identity_on_every_kernel_and_format():
    for format in FORMATS:
        for kernel in ("matmul", "dot", "dot_gather"):
            for group in (0, 32, 64, 128):
                check_identity(replace(format, group=group), kernel)


@pytest.mark.parametrize("kernel", ("gemv", "gemv_gather"))
def test_unit_rows_give_columns_of_the_weight_to_the_bit(kernel):
    case = one_case(VqFormat(2, 64, 32, 128, 64), 1, 48, 192)
    x = np.zeros((3, 192), np.float32)
    x[[0, 1, 2], [5, 130, 191]] = 1
    levels, factors = unpack(case.inputs, case.attributes)
    with forced(kernel):
        found = parity.run(LINEAR, replace(case, inputs={**case.inputs, "x": x})).cpu().numpy()
    np.testing.assert_array_equal(found, (factors * levels)[:, [5, 130, 191]].T)


@pytest.mark.parametrize("kernel", every_case.VQ)
def test_results_do_not_change_between_runs(kernel):
    with forced(kernel):
        parity.check_repeats(LINEAR, one_case(VqFormat(2, 16, 16, 128, 128), 2, 16, 192))


@pytest.mark.parametrize("activation", (Activation.FLOAT, Activation.INT8_BLOCK), ids=lambda a: a.label)
@pytest.mark.parametrize("kernel", every_case.VQ)
def test_a_row_that_is_not_finite_is_nan_and_others_are_as_without_it(kernel, activation):
    case = one_case(VqFormat(2, 256, 16, 128, 128), 4, 16, 192, activation)
    broken = case.inputs["x"].copy()
    broken[1, 190], broken[2, 3] = np.inf, np.nan
    with forced(kernel):
        found = parity.run(LINEAR, replace(case, inputs={**case.inputs, "x": broken}))
        plain = parity.run(LINEAR, case)
    assert found[1:3].isnan().all()
    assert torch.equal(found[[0, 3]], plain[[0, 3]])


def test_a_scratch_in_parts_gives_the_same_bits():
    case = one_case(VqFormat(1, 8, 16, 128, 128), 3, 200, 128)
    with forced("matmul", chunk=0):
        whole = parity.run(LINEAR, case)
    with forced("matmul", chunk=64 * 128 * 4):
        assert torch.equal(parity.run(LINEAR, case), whole)


@pytest.mark.parametrize("table", ("nf4", "fp4"))
def test_a_fixed_table_of_sixteen_levels(table):
    from qcompiler.recipe.schema import VQ_FORMATS

    case = one_case(VqFormat.parse(VQ_FORMATS[table]), 1, 33, 130)
    for kernel in ("gemv", "dot_gather"):
        with forced(kernel):
            parity.check(LINEAR, case)


def test_rows_are_counted_from_the_end():
    case = ROWS[0]
    turned = replace(case, inputs={**case.inputs, "indices": case.inputs["indices"] - case.attributes["n"]})
    expected = EMBEDDING.reference(case.inputs, case.attributes)
    np.testing.assert_array_equal(parity.run(EMBEDDING, turned).cpu().numpy(), expected)


@pytest.mark.skipif(parity.CUDA, reason="ends the program on a GPU")
@pytest.mark.parametrize("beyond", (lambda n: n, lambda n: -n - 1), ids=("above", "below"))
def test_rows_that_are_not_there(beyond):
    case = ROWS[0]
    outside = replace(case, inputs={**case.inputs, "indices": np.array([0, beyond(case.attributes["n"])])})
    with pytest.raises(RuntimeError, match="embedding_vq: an index is outside"):
        parity.run(EMBEDDING, outside)


def test_no_rows_give_no_rows():
    case = next(c for c in every_case.cases("linear_vq") if 0 in c.inputs["x"].shape and "gate" not in c.attributes)
    assert parity.run(LINEAR, case).shape == (0, case.attributes["n"])


@pytest.mark.parametrize("dim", (1, 2, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=parity.dtype_label)
def test_words_hold_whole_entries_and_follow_their_codebooks(dim, dtype):
    from qcompiler.gpu import vq_launch

    codebooks = torch.from_numpy(np.random.default_rng(1).integers(-128, 127, (3, 2, dim, 16), np.int8))
    numbers = torch.int8 if dtype == torch.float32 else dtype

    def entries(words: torch.Tensor) -> torch.Tensor:
        return words.contiguous().view(torch.uint8).view(numbers).view(3, 2, 16, dim)

    words = vq_launch.entry_words(codebooks, dtype)
    assert torch.equal(entries(words).float(), codebooks.transpose(2, 3).float())
    assert vq_launch.entry_words(codebooks, dtype) is words
    codebooks += 1
    assert torch.equal(entries(vq_launch.entry_words(codebooks, dtype)).float(), codebooks.transpose(2, 3).float())
    held = len(vq_launch._derived)
    del codebooks
    assert len(vq_launch._derived) == held - 1


def test_what_the_table_names_must_be_a_kernel_of_the_op():
    from qcompiler.gpu import dispatch

    with dispatch.forced("int_mm", chunk=0), pytest.raises(UnsupportedError, match="'int_mm', which .* there are gemv"):
        parity.run(LINEAR, one_case(VqFormat(2, 16, 0, 0, 0), 1, 16, 128))
    with dispatch.forced("matmul", chunk=0), pytest.raises(UnsupportedError, match="embedding_vq: .* names kernel 'matmul'"):
        parity.run(EMBEDDING, ROWS[0])


def test_tensors_that_do_not_fit_are_refused_before_they_are_read():
    case = one_case(VqFormat(2, 64, 32, 256, 128), 1, 64, 256)
    short = replace(case, inputs={**case.inputs, "codes": case.inputs["codes"][:, :-1]})
    with pytest.raises(RuntimeError, match=r"linear_vq: codes are torch.uint8 \[4, 7, 192\].*expected torch.uint8 \[4, 8, 192\]"):
        parity.run(LINEAR, short)
    with pytest.raises(RuntimeError, match="x has 128 columns, the weight 256"):
        parity.run(LINEAR, replace(case, inputs={**case.inputs, "x": case.inputs["x"][:, :128]}))


def test_a_dtype_that_the_kernels_do_not_take():
    with pytest.raises(UnsupportedError, match="x is torch.float64"):
        parity.run(LINEAR, one_case(VqFormat(2, 16, 0, 0, 0), 1, 16, 128), torch.float64)
