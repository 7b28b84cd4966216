"""The artifact writer: what it makes, and what it refuses to touch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from qcompiler.artifact import ArtifactWriter
from qcompiler.artifact.files import check_name
from qcompiler.errors import CapacityError, InputError
from qcompiler.runtime.artifact import open_artifact, verify_files
from tests.report import fake


def test_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    target = fake.write(tmp_path / "out")
    manifest = json.loads((target / "manifest.json").read_bytes())
    on_disk = {name for name, content in fake.snapshot(target).items() if content is not None}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, info in manifest["files"].items():
        content = (target / name).read_bytes()
        assert info == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert verify_files(open_artifact(target)) == len(manifest["files"])
    assert os.listdir(tmp_path) == ["out"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = fake.write(tmp_path / "one"), fake.write(tmp_path / "two")
    assert fake.snapshot(one) == fake.snapshot(two)


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        assert writer.write_json("a.json", {"b": 1, "a": "ü"}).read_bytes() == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
        assert writer.write_lines("b.jsonl", [{"b": 1, "a": 2}, {}]).read_bytes() == b'{"a": 2, "b": 1}\n{}\n'
        with pytest.raises(ValueError, match="JSON compliant"):
            writer.write_json("c.json", {"x": float("nan")})
        writer.set_manifest(fake.manifest())


def test_target_has_no_name_before_the_end(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("a", "x")
        assert not (tmp_path / "out").exists()
        assert writer.directory.name == f".out.partial-{os.getpid()}"
        assert not (writer.directory / "manifest.json").exists()
        writer.set_manifest(fake.manifest())
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ArtifactWriter("out") as writer:
        os.chdir("/")
        writer.set_manifest(fake.manifest())
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("deep/er/a", "x")
        raise RuntimeError("boom")
    assert os.listdir(tmp_path) == []


def test_leaving_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="set_manifest"), ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("a", "x")
    assert os.listdir(tmp_path) == []


def test_overwrite_replaces_an_artifact(tmp_path: Path) -> None:
    fake.write(tmp_path / "out", recipe="old")
    fake.write(tmp_path / "out", {"model.onnx": b"new"}, overwrite=True, recipe="new")
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["recipe"] == "new"
    assert sorted(fake.snapshot(tmp_path / "out")) == ["manifest.json", "model.onnx"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that cannot swap two names: two renames, the old artifact is never gone before the new one stands."""
    monkeypatch.setattr("qcompiler.artifact.files.exchange", lambda first, second: False)
    fake.write(tmp_path / "out", recipe="old")
    fake.write(tmp_path / "out", overwrite=True, recipe="new")
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["recipe"] == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The next writer gives the old artifact its name back before it does anything else."""
    fake.write(tmp_path / "out", recipe="old")
    before = fake.snapshot(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.old-999999")
    with pytest.raises(InputError, match="already holds an artifact"), ArtifactWriter(tmp_path / "out"):
        pass
    assert fake.snapshot(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


def test_failed_overwrite_keeps_the_old_artifact(tmp_path: Path) -> None:
    fake.write(tmp_path / "out", recipe="old")
    before = fake.snapshot(tmp_path)
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "out", overwrite=True) as writer:
        writer.write_text("a", "x")
        raise RuntimeError("boom")
    assert fake.snapshot(tmp_path) == before


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b'{"format": "other"}', b"[" * 100_000])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_not_ours_is_never_touched(tmp_path: Path, content: bytes | None, overwrite: bool) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    if content is not None:
        (target / "manifest.json").write_bytes(content)
    before = fake.snapshot(tmp_path)
    with pytest.raises(InputError, match="not a qcompiler artifact"), ArtifactWriter(target, overwrite=overwrite):
        pass
    assert fake.snapshot(tmp_path) == before


def test_an_empty_directory_or_a_file_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with (
            pytest.raises(InputError, match="not a qcompiler artifact"),
            ArtifactWriter(tmp_path / name, overwrite=True),
        ):
            pass


def test_files_of_the_user_in_an_old_artifact_are_not_deleted(tmp_path: Path) -> None:
    fake.write(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"), ArtifactWriter(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    fake.write(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(InputError, match="symbolic link"), ArtifactWriter(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out").is_symlink()


def test_an_artifact_needs_overwrite(tmp_path: Path) -> None:
    fake.write(tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"), ArtifactWriter(tmp_path / "out"):
        pass


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a qcompiler artifact"), ArtifactWriter(tmp_path / "out") as writer:
        writer.set_manifest(fake.manifest())
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_output_and_model_must_lie_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("model")
    for target, source, message in (
        (model / "out", model, "inside the model"),
        (tmp_path / "alias" / "out", model, "inside the model"),
        (model / "sub" / "out", tmp_path / "alias", "inside the model"),
        (model, model, "is the model itself"),
        (tmp_path / "model", tmp_path / "alias", "is the model itself"),
        (model, model / "sub", "inside the output"),
    ):
        with pytest.raises(InputError, match=message), ArtifactWriter(target, overwrite=True, source_dir=source):
            pass
    assert sorted(os.listdir(tmp_path)) == ["alias", "model"]


def test_parent_must_exist_and_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no directory"), ArtifactWriter(tmp_path / "no" / "out"):
        pass
    with pytest.raises(InputError, match="cannot be the output"), ArtifactWriter("/"):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="no permission"), ArtifactWriter(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_reserve_names_the_missing_bytes(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"[\d,]+ bytes are missing"), ArtifactWriter(tmp_path / "out") as writer:
        writer.reserve(1000)
        writer.reserve(10**18)
    assert os.listdir(tmp_path) == []


def test_add_file_copies_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("tokens")
    (tmp_path / "tokenizer.json").symlink_to("blob")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file(tmp_path / "tokenizer.json")
        with pytest.raises(InputError, match="not a regular file"):
            writer.add_file(tmp_path, "folder")
        writer.set_manifest(fake.manifest())
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == "tokens" and not copied.is_symlink()


def test_a_link_inside_the_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a regular file"), ArtifactWriter(tmp_path / "out") as writer:
        writer.path("a").symlink_to("/etc/passwd")
        writer.set_manifest(fake.manifest())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "./a", "a\\b", "C:x", "a\0b", "a\nb", "NUL", "com1.txt",
     "a/con", "a.", "a ", "x" * 256],
)  # fmt: skip
def test_names_that_leave_or_mislead_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a file of an artifact"):
        check_name(name)


def test_the_manifest_is_not_a_name_to_write(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="set_manifest"):
            writer.path("manifest.json")
        writer.set_manifest(fake.manifest())
    with pytest.raises(RuntimeError, match="outside"):
        writer.path("late")


def test_names_of_ordinary_files_pass() -> None:
    for name in ("model.onnx", "model.onnx.data", "trace/graphs/000-capture.txt", "chat_template.jinja", "console"):
        assert check_name(name) == name
