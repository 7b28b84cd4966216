"""Full disks, kills, signals, two writers: a directory is complete, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qcompiler.artifact import ArtifactWriter
from qcompiler.artifact.lock import alive, boot_id
from qcompiler.errors import CapacityError, InputError
from qcompiler.runtime.artifact import open_artifact, verify_files
from tests.report import fake

ROOT = Path(__file__).parents[2]

# A writer in a process of its own: writes many files slowly, so that a signal finds it somewhere on the way.
WRITER = """
    import sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from qcompiler.artifact import ArtifactWriter
    from tests.report import fake
    with ArtifactWriter(Path({target!r}), overwrite={overwrite}) as writer:
        print("open", flush=True)
        for i in range({files}):
            writer.path(f"part/{{i}}.bin").write_bytes(bytes([i % 256]) * 20_000)
            time.sleep({pause})
        writer.set_manifest(fake.manifest(recipe="new", entry="part/0.bin"))
    print("done", flush=True)
"""


def start(target: Path, *, files: int = 200, pause: float = 0.002, overwrite: bool = False) -> subprocess.Popen[str]:
    code = textwrap.dedent(WRITER).format(
        root=str(ROOT), target=str(target), files=files, pause=pause, overwrite=overwrite
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_full_disk_by_file_size_limit(tmp_path: Path) -> None:
    """A limit on file sizes (EFBIG) stands for a full disk; it needs no special rights."""
    code = textwrap.dedent(f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from qcompiler.artifact import ArtifactWriter
        from qcompiler.errors import CapacityError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with ArtifactWriter({str(tmp_path / "out")!r}) as writer:
                writer.write_text("small", "x")
                writer.reserve(1_000_000)
                writer.path("model.onnx.data").write_bytes(bytes(1_000_000))
        except CapacityError as error:
            print(error)
            sys.exit(error.exit_code)
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 6, result.stderr
    assert "file size limit reached while writing" in result.stdout
    assert str(tmp_path / "out" / "model.onnx.data") in result.stdout
    assert "bytes were written" in result.stdout and "900,000 were still to come" in result.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_anywhere_inside(tmp_path: Path, code: int) -> None:
    with pytest.raises(CapacityError, match="bytes were written") as caught, ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("a", "12345")
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise RuntimeError("the exporter failed") from error
    assert str(tmp_path / "out" / "a") in str(caught.value) and "5 bytes" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_full_disk_told_in_words(tmp_path: Path) -> None:
    """Libraries in Rust say it in the text of an error of their own."""
    with pytest.raises(CapacityError), ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("a", "1")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert os.listdir(tmp_path) == []


def nth_call_fails(monkeypatch: pytest.MonkeyPatch, name: str, n: int, code: int) -> list[int]:
    """Make the n-th call of os.<name> fail; returns a list that counts the calls."""
    real, calls = getattr(os, name), [0]

    def wrapped(*args: object, **keywords: object) -> object:
        calls[0] += 1
        if calls[0] == n:
            raise OSError(code, os.strerror(code))
        return real(*args, **keywords)

    monkeypatch.setattr(os, name, wrapped)
    return calls


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_fsync_and_rename_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool, exchange: bool, code: int
) -> None:
    """Whichever call fails: the old artifact stays (or nothing is there), and the next attempt works."""
    if not exchange:
        monkeypatch.setattr("qcompiler.artifact.files._renameat2", lambda source, target, flags: False)
    files = {"model.onnx": b"graph", "trace/a.txt": b"a"}
    if overwrite:
        fake.write(tmp_path / "out", recipe="old")
    before = fake.snapshot(tmp_path)
    failures = 0
    for n in range(1, 50):
        with monkeypatch.context() as patch:
            calls = nth_call_fails(patch, name, n, code)
            try:
                fake.write(tmp_path / "out", files, overwrite=overwrite, recipe="new")
            except OSError:
                assert code == errno.EIO
                failures += 1
            except CapacityError:
                assert code == errno.ENOSPC
                failures += 1
        if calls[0] < n:
            break
        assert fake.snapshot(tmp_path) == before, f"call {n} of {name}"
    assert failures == n - 1
    # In place of os.rename the kernel's own exchange is used where it exists; then there is nothing to fail here.
    assert failures > 0 or (name == "rename" and exchange)
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["recipe"] == "new"
    assert verify_files(open_artifact(tmp_path / "out")) == 2
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_random_moments(tmp_path: Path, overwrite: bool, exhaustive: bool) -> None:
    """kill -9 leaves no directory at the target that looks finished, and nothing that hinders the next writer."""
    target = tmp_path / "out"
    if overwrite:
        fake.write(target, recipe="old")
    before = fake.snapshot(target)
    draw = random.Random(5)
    for _ in range(200 if exhaustive else 6):
        process = start(target, files=30, pause=0.001, overwrite=overwrite)
        time.sleep(draw.uniform(0, 0.12))
        process.kill()
        finish(process)
        if target.exists() and fake.snapshot(target) != before:
            # It was done before the kill: then all of it is there.
            assert json.loads((target / "manifest.json").read_bytes())["recipe"] == "new"
            assert verify_files(open_artifact(target)) == 30
            if not overwrite:  # the next writer would be refused
                shutil.rmtree(target)
    last = start(target, files=2, overwrite=True)
    assert finish(last) == (0, "")
    assert verify_files(open_artifact(target)) == 2
    assert os.listdir(tmp_path) == ["out"], "what the killed ones left is cleared"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("overwrite", [False, True])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals, overwrite: bool) -> None:
    if overwrite:
        fake.write(tmp_path / "out", recipe="old")
    before = fake.snapshot(tmp_path)
    process = start(tmp_path / "out", overwrite=overwrite)
    time.sleep(0.05)
    process.send_signal(number)
    code, err = finish(process)
    assert code != 0 and "KeyboardInterrupt" in err or "Terminated" in err
    assert fake.snapshot(tmp_path) == before


def test_two_writers(tmp_path: Path) -> None:
    process = start(tmp_path / "out", files=10_000)
    try:
        with pytest.raises(InputError, match=f"process {process.pid} is writing"), ArtifactWriter(tmp_path / "out"):
            pass
        with ArtifactWriter(tmp_path / "other") as writer:  # another target is no matter
            writer.set_manifest(fake.manifest())
    finally:
        process.kill()
        finish(process)
    with ArtifactWriter(tmp_path / "out") as writer:  # the kernel gave the dead one's lock back
        writer.set_manifest(fake.manifest())
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        with pytest.raises(InputError, match="is writing"), ArtifactWriter(tmp_path / "out"):
            pass
        assert writer.directory.is_dir()
        writer.set_manifest(fake.manifest())


def test_lock_without_kernel_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without flock: process id and boot id decide."""
    monkeypatch.setattr("qcompiler.artifact.lock.fcntl", None)
    lock = tmp_path / ".out.lock"
    lock.write_text(json.dumps({"pid": os.getppid(), "boot": boot_id()}))
    with pytest.raises(InputError, match=f"process {os.getppid()} is writing"), ArtifactWriter(tmp_path / "out"):
        pass
    for stale in ({"pid": os.getppid(), "boot": "another boot"}, {"pid": 2**22 + 1, "boot": boot_id()}, "rubbish"):
        lock.write_text(json.dumps(stale))
        with ArtifactWriter(tmp_path / "out", overwrite=True) as writer:
            writer.set_manifest(fake.manifest())
    assert os.listdir(tmp_path) == ["out"]


def test_processes_of_another_boot_are_dead() -> None:
    assert alive(os.getpid(), boot_id())
    assert not alive(os.getpid(), "another boot")
    assert not alive(0, boot_id())


def test_a_forked_worker_does_not_remove_its_parents_output(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write_text("a", "x")
        pid = os.fork()
        if pid == 0:
            try:
                writer.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert (writer.directory / "a").is_file()
        writer.set_manifest(fake.manifest())
    assert (tmp_path / "out" / "a").is_file()


def test_handlers_are_as_before_afterwards(tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "an earlier test left a handler behind"
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fake.write(tmp_path / "out")
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["pwrite", "ftruncate", "mkdir"])
def test_full_disk_before_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    nth_call_fails(monkeypatch, name, 1, errno.ENOSPC)
    with pytest.raises(CapacityError, match="no space left"), ArtifactWriter(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []
