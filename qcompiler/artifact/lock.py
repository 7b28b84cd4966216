"""One writer for one target directory at a time."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from qcompiler.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def boot_id() -> str:
    """What tells this boot of the machine from another: a process id from before a restart means nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Elsewhere: the boot time in whole minutes is near enough; it only separates boots.
        return f"boot-{int((time.time() - time.monotonic()) // 60)}"


def alive(pid: int, boot: str) -> bool:
    """Whether the process that wrote (pid, boot) down may still run."""
    if boot != boot_id() or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists and is not ours
        pass
    return True


class WriterLock:
    """An exclusive lock file beside the target. The kernel releases it when its holder dies, however it dies."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise InputError naming the process that holds it."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                if not self._take(fd):
                    raise self._refusal(fd)
                # Between our open and our lock the last holder may have removed the name: then it locks nothing.
                if self._still_named(fd):
                    self._fd, fd = fd, -1
                    self._sign()
                    return
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(fd)

    def _sign(self) -> None:
        """Write down who holds the lock; on a full disk that fails, and then nobody holds it."""
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "boot": boot_id()}).encode(), 0)
        except OSError:
            self.release()
            raise

    def _take(self, fd: int) -> bool:
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError:
                pass  # no locks on this file system: the recorded process id decides
        holder = self._holder(fd)
        return holder is None or not alive(*holder)

    def _still_named(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, fd: int) -> InputError:
        holder = self._holder(fd)
        who = f"process {holder[0]}" if holder else "another process"
        return InputError(
            f"{who} is writing {self._target} right now (lock {self.path}); wait for it or choose another directory"
        )

    @staticmethod
    def _holder(fd: int) -> tuple[int, str] | None:
        try:
            record = json.loads(os.pread(fd, 4096, 0))
            return int(record["pid"]), str(record["boot"])
        except (ValueError, KeyError, TypeError):
            return None
