from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from qcompiler.errors import InputError, UsageError
from qcompiler.evaluate import calibration_text, evaluation_text, read_text


def test_the_split_is_deterministic_disjoint_and_whole():
    calibration, evaluation = calibration_text(), evaluation_text()
    assert calibration == calibration_text() and evaluation == evaluation_text()
    names = sorted(topics)
    cut = len(names) * 2 // 3
    assert calibration.content == "\n\n".join(topics[name] for name in names[:cut])
    assert evaluation.content == "\n\n".join(topics[name] for name in names[cut:])
    assert "first two thirds" in calibration.description and "last third" in evaluation.description


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "b").write_text("zweite Zeile: ü", encoding="utf-8")
    (tmp_path / "a").write_text("first", encoding="utf-8")
    text = read_text([tmp_path / "b", tmp_path / "a"])
    assert text.content == "zweite Zeile: ü\n\nfirst"
    assert text.description == "b, a"
    assert read_text(str(tmp_path / "a")).content == "first"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "a.txt").content == "one\ntwo"


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InputError, match=r"latin' is not UTF-8: byte 3 is 0xe9"):
        read_text(tmp_path / "latin")
    with pytest.raises(InputError, match=r"cannot read text file '.*missing': No such file"):
        read_text([tmp_path / "missing"])
    with pytest.raises(InputError, match="no text in empty"):
        read_text([tmp_path / "empty"])
    with pytest.raises(InputError, match="cannot read"):
        read_text([tmp_path])
    with pytest.raises(UsageError, match="at least one"):
        read_text([])
