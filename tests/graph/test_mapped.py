"""Tensors in files: the same numbers, none of them in memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qcompiler.errors import CapacityError
from qcompiler.graph.mapped import kept, kept_fields, mapped
from qcompiler.pipeline.memory import PeakAnonymous, anonymous_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what memory no file backs")
MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (), (0, 4)])
def test_the_numbers_come_back(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape).mul(9).to(dtype)
    found = mapped(tensor, tmp_path / "file")
    assert found.dtype is dtype and found.shape == tensor.shape and torch.equal(found, tensor)


def test_a_transposed_tensor_is_laid_out_anew(tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).t()
    found = mapped(tensor, tmp_path / "file")
    assert found.is_contiguous() and torch.equal(found, tensor)


def test_a_write_stays_in_the_process(tmp_path: Path) -> None:
    found = mapped(torch.zeros(8), tmp_path / "file")
    found[3] = 1
    assert (tmp_path / "file").read_bytes() == bytes(32)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        mapped(torch.zeros(8), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@linux
def test_what_is_mapped_takes_no_memory(tmp_path: Path) -> None:
    tensor = torch.ones(64 * MIB, dtype=torch.uint8)
    held = anonymous_bytes()
    tensor = mapped(tensor, tmp_path / "file")
    assert held - anonymous_bytes() > 60 * MIB
    assert tensor.sum() == 64 * MIB
    assert held - anonymous_bytes() > 60 * MIB


@linux
def test_the_peak_counts_what_is_allocated_and_not_what_is_mapped(tmp_path: Path) -> None:
    file = mapped(torch.ones(64 * MIB, dtype=torch.uint8), tmp_path / "file")
    with PeakAnonymous() as mapping:
        assert file.amax() == 1
    with PeakAnonymous() as allocating:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert mapping.growth < 8 * MIB
    assert 60 * MIB < allocating.growth < 80 * MIB, held.shape
    assert allocating.peak == allocating.start + allocating.growth


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of a file")
def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CapacityError, match=r"cannot write .*file: .*65,536 bytes"):
            mapped(torch.zeros(65536, dtype=torch.uint8), tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Pair:
    left: torch.Tensor
    right: torch.Tensor | None
    label: str


def test_fields_of_a_dataclass(tmp_path: Path) -> None:
    pair = Pair(torch.arange(5), None, "name")
    assert kept_fields(pair, None, "site") is pair
    found = kept_fields(pair, tmp_path, "a/b.site")
    assert torch.equal(found.left, pair.left) and found.left.data_ptr() != pair.left.data_ptr()
    assert (found.right, found.label) == (None, "name")
    assert [path.name.endswith("a_b.site.left") for path in tmp_path.iterdir()] == [True]


def test_equal_names_get_files_of_their_own(tmp_path: Path) -> None:
    first, second = (kept({"codes": torch.full((4,), value)}, tmp_path, "site")["codes"] for value in (1, 2))
    assert first.tolist() == [1] * 4 and second.tolist() == [2] * 4
