"""Names, durability and disk-full detection: the file-system ground under the artifact writer."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qcompiler.errors import InputError

# What "the disk is full" looks like: no blocks, no quota, or a file beyond the limit of the file system or process.
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit reached"}

# Libraries written in Rust or C++ turn an errno into text; these are the spellings they use.
_FULL_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|File too large"
    rf"|os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b"
)

# Windows resolves these to devices whatever their extension; an artifact must be movable there.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def check_name(name: str) -> str:
    """Return `name` when it is a plain relative path, safe on every system; else raise InputError."""
    for part in name.split("/"):
        if (
            part in ("", ".", "..")
            or len(part.encode("utf-8", "surrogatepass")) > 255
            or part.endswith((" ", "."))
            or any(ord(c) < 32 or c in '\\:*?"<>|' or c == "\x7f" for c in part)
            or part.split(".")[0].lower() in _DEVICES
        ):
            raise InputError(
                f"{name!r} cannot be a file of an artifact: expected a relative path such as 'trace/passes.jsonl'"
            )
    return name


def walk_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every regular file under `root` as (name with forward slashes, path), sorted; anything else is refused."""
    found = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        for name in folders + names:
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise InputError(f"{path} is neither a regular file nor a directory; an artifact holds nothing else")
        found += [Path(folder, name) for name in names]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in found)


def digest(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, as the manifest records them."""
    with open(path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha}


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the medium."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the medium (nothing to do where directories cannot be opened)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems refuse fsync on a directory; they make entries durable themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must not exist; plain rename would silently replace an empty directory made meanwhile."""
    if not _renameat2(source, target, RENAME_NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step. False where the system cannot; the caller then needs two renames."""
    return _renameat2(first, second, RENAME_EXCHANGE)


def disk_full(error: BaseException) -> tuple[str, str | None] | None:
    """(what ran out, file name or None) when `error`, or what it was raised from, means a full disk; else None."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in FULL:
            return FULL[current.errno], current.filename if isinstance(current.filename, str) else None
        # Errors of our own were raised knowingly; their text may quote these words without meaning them.
        if not isinstance(current, (OSError, InputError)) and (found := _FULL_TEXT.search(str(current))):
            return found.group(0), None
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return None


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags. False where this system or file system does not have it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd = -100
    paths = os.fsencode(source), os.fsencode(target)
    if function(at_cwd, ctypes.c_char_p(paths[0]), at_cwd, ctypes.c_char_p(paths[1]), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _raise(error: OSError) -> None:
    raise error
