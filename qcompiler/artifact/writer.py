"""Writing an artifact: aside, then renamed. The directory is complete, or it is not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qcompiler.artifact import files, interrupt
from qcompiler.artifact.lock import WriterLock
from qcompiler.artifact.manifest import FORMAT, NAME, dump_json, read_ours, seal
from qcompiler.errors import CapacityError, InputError

# Kept free beyond what is asked for: file systems slow down and metadata grows near the end.
HEADROOM = 0.05


class ArtifactWriter:
    """Context manager that builds an artifact beside `target` and gives it its name when all is well.

    Inside the block write files under `path(name)`, or with `write_json`, `write_lines`, `write_text`, `add_file`; call
    `set_manifest` once. Leaving the block normally hashes and syncs everything, writes `manifest.json` last, renames.
    Leaving it by any exception, SIGINT or SIGTERM removes what was written and leaves an older artifact as it was.

    Args:
        target_dir: the directory to make. Its parent must exist. An existing one is replaced only when it is an
            artifact and `overwrite` is given; whatever else has that name is never touched.
        overwrite: replace an artifact of ours.
        source_dir: directory or file that the model is read from; neither may lie inside the other.

    Raises:
        InputError: the target is refused, or another process writes it.
        CapacityError: it does not fit on the disk.
    """

    def __init__(
        self,
        target_dir: str | os.PathLike[str],
        overwrite: bool = False,
        source_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        given = Path(target_dir)
        # Only the parent is resolved: a link in the target's own place must be seen as the link it is.
        self.target = Path(os.path.realpath(given.parent if given.name not in ("", "..") else given)) / given.name
        self._overwrite = overwrite
        self._source = Path(os.path.realpath(source_dir)) if source_dir is not None else None
        self._pid = os.getpid()
        self._aside = self.target.parent / f".{self.target.name}.partial-{self._pid}"
        self._lock = WriterLock(self.target.parent / f".{self.target.name}.lock", self.target)
        self._manifest: dict[str, Any] | None = None
        self._reserved = 0
        self._open = False
        self._signals = contextlib.ExitStack()

    # Entering

    def check(self) -> None:
        """Refuse a bad target without creating anything; `--dry-run` calls this alone."""
        self._check_parent()
        self._check_source()
        self._check_target()

    def __enter__(self) -> ArtifactWriter:
        self.check()
        self._signals.enter_context(interrupt.sigterm_raises())
        try:
            self._lock.acquire()
            # Again under the lock: the writer before us may just have finished.
            self._check_target()
            self._clear_stale()
            self._aside.mkdir()
        except BaseException as error:
            self._lock.release()
            self._signals.close()
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise
        self._open = True
        return self

    def _check_parent(self) -> None:
        parent = self.target.parent
        if not self.target.name:
            raise InputError(f"{self.target} cannot be the output: give a new directory inside it")
        if not parent.is_dir():
            raise InputError(f"cannot write {self.target}: there is no directory {parent}; create it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {self.target}: no permission to create files in {parent}")

    def _check_source(self) -> None:
        if self._source is None:
            return
        target = Path(os.path.realpath(self.target))
        if target == self._source:
            raise InputError(f"the output {self.target} is the model itself; choose another directory")
        if target.is_relative_to(self._source):
            raise InputError(f"the output {self.target} lies inside the model {self._source}; choose one outside it")
        if self._source.is_relative_to(target):
            raise InputError(f"the model {self._source} lies inside the output {self.target}; choose another")

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink():
            raise InputError(f"{self.target} is a symbolic link; give the directory itself")
        manifest = read_ours(self.target) if self.target.is_dir() else None
        if manifest is None:
            raise InputError(
                f"{self.target} exists and is not a qcompiler artifact (no {NAME} of format {FORMAT!r}); "
                "it is left as it is: choose another name or remove it yourself"
            )
        if not self._overwrite:
            raise InputError(
                f"{self.target} already holds an artifact; --overwrite replaces it, or choose another name"
            )
        listed = manifest.get("files")
        known = {NAME, *(listed if isinstance(listed, dict) else ())}
        strange = [name for name, _ in files.walk_files(self.target) if name not in known]
        if strange:
            raise InputError(
                f"{self.target} cannot be replaced: it holds files that its manifest does not list "
                f"({', '.join(strange[:3])}{', …' if len(strange) > 3 else ''}); move them away first"
            )

    def _clear_stale(self) -> None:
        """Remove what a killed writer of this target left. We hold its lock, so no such writer is alive."""
        pattern = re.compile(rf"\.{re.escape(self.target.name)}\.(partial|old)-\d+")
        for path in sorted(self.target.parent.iterdir()):
            if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            if ".old-" in path.name[len(self.target.name) :] and not os.path.lexists(self.target):
                # Killed between the two renames of a replacement: the old artifact gets its name back.
                os.rename(path, self.target)
                self._check_target()
            else:
                shutil.rmtree(path)

    def _cannot_write(self, error: OSError) -> Exception:
        if error.errno in files.FULL:
            return CapacityError(f"cannot write {self.target}: {files.FULL[error.errno]} in {self.target.parent}")
        return InputError(f"cannot write {self.target}: {error.strerror or error}")

    # Writing

    @property
    def directory(self) -> Path:
        """The directory that is being written. It does not have its final name yet."""
        return self._aside

    def path(self, name: str) -> Path:
        """Where to write the file of that name; parent folders are made."""
        if not self._open:
            raise RuntimeError("ArtifactWriter.path: outside the `with` block")
        if files.check_name(name) == NAME:
            raise ValueError(f"{NAME} is written by ArtifactWriter itself; call set_manifest")
        path = self._aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def open(self, name: str) -> IO[bytes]:
        """A new file to write bytes to."""
        return open(self.path(name), "xb")

    def add_file(self, source: str | os.PathLike[str], name: str | None = None) -> Path:
        """Copy a regular file in (what a link points to, not the link)."""
        source = Path(source)
        if not source.is_file():
            raise InputError(f"cannot copy {source} into the artifact: not a regular file")
        path = self.path(name or source.name)
        shutil.copyfile(source, path)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write UTF-8 text with newlines as given."""
        path = self.path(name)
        path.write_bytes(text.encode("utf-8"))
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write one JSON value: equal values give equal bytes."""
        return self.write_text(name, dump_json(value))

    def write_lines(self, name: str, records: Iterable[Any]) -> Path:
        """Write one JSON value a line."""
        lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        return self.write_text(name, "".join(lines))

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """What `build_manifest` returned; `files` is added when the block is left."""
        if manifest.get("format") != FORMAT:
            raise ValueError(f"manifest of format {manifest.get('format')!r}: expected {FORMAT!r}; use build_manifest")
        self._manifest = dict(manifest)

    def reserve(self, size: int) -> None:
        """Raise CapacityError unless `size` more bytes (and 5 %) fit; call it before writing what is big."""
        need = size + int(size * HEADROOM)
        free = self._free()
        if need > free:
            raise CapacityError(
                f"{self.target} would not fit: {size:,} bytes are still to be written and 5 % more kept free, "
                f"{self.target.parent} has {free:,} bytes free; {need - free:,} bytes are missing"
            )
        self._reserved = self.written() + size

    def written(self) -> int:
        """Bytes written so far."""
        return sum(path.stat().st_size for _, path in files.walk_files(self._aside))

    def _free(self) -> int:
        return shutil.disk_usage(self.target.parent).free

    # Leaving

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked worker unwound through our frame; the directory belongs to its parent
        try:
            if error is None:
                try:
                    self._commit()
                except BaseException as failure:
                    self._abandon(failure)
                    raise
            else:
                self._abandon(error)
        finally:
            self._open = False
            with interrupt.deferred():
                self._lock.release()
                self._signals.close()

    def _abandon(self, error: BaseException) -> None:
        """Remove what was written; raise CapacityError in place of `error` when a full disk was behind it."""
        with interrupt.deferred():
            full = self._describe_full(error)
            leftovers: list[str] = []
            shutil.rmtree(self._aside, onerror=lambda _, path, info: leftovers.append(f"{path}: {info[1]}"))
            if leftovers and os.path.lexists(self._aside):
                note = f"the unfinished {self._aside} could not be removed ({leftovers[0]}); remove it by hand"
                error.add_note(note)
                if full:
                    full.add_note(note)
        if full:
            raise full from error

    def _describe_full(self, error: BaseException) -> CapacityError | None:
        found = files.disk_full(error)
        if found is None or isinstance(error, CapacityError):
            return None
        what, name = found
        sizes = {path: path.stat() for path in self._aside.rglob("*") if path.is_file() and not path.is_symlink()}
        written = sum(stat.st_size for stat in sizes.values())
        if name is None and sizes:  # a failed write() does not say where: it is what was touched last
            name = str(max(sizes, key=lambda path: sizes[path].st_mtime_ns))
        if name and Path(name).is_relative_to(self._aside):  # say it by the name that the user gave
            name = str(self.target / Path(name).relative_to(self._aside))
        missing = self._reserved - written
        more = f", about {missing:,} were still to come" if missing > 0 else ""
        return CapacityError(
            f"{what} while writing {name or self.target}: {written:,} bytes were written{more}, "
            f"{self._free():,} bytes are free in {self.target.parent}; the unfinished output was removed"
        )

    def _commit(self) -> None:
        if self._manifest is None:
            raise RuntimeError("ArtifactWriter: the block ended without set_manifest")
        contents = {}
        for name, path in files.walk_files(self._aside):
            files.sync_file(path)
            contents[files.check_name(name)] = files.digest(path)
        for folder, _, _ in os.walk(self._aside, topdown=False):
            files.sync_directory(Path(folder))
        manifest = self._aside / NAME
        manifest.write_bytes(seal({**self._manifest, "files": contents}))
        files.sync_file(manifest)
        files.sync_directory(self._aside)
        with interrupt.deferred():
            self._publish()

    def _publish(self) -> None:
        """Give the finished directory its name; an older artifact keeps it until the moment of the swap."""
        self._check_target()  # something may have come into being there since we began
        parent = self.target.parent
        if not os.path.lexists(self.target):
            files.rename_new(self._aside, self.target)
            try:
                files.sync_directory(parent)
            except OSError:
                os.rename(self.target, self._aside)
                raise
            return
        if files.exchange(self._aside, self.target):
            old = self._aside
            try:
                files.sync_directory(parent)
            except OSError:
                files.exchange(self._aside, self.target)
                raise
        else:
            old = parent / f".{self.target.name}.old-{self._pid}"
            os.rename(self.target, old)
            try:
                os.rename(self._aside, self.target)
                files.sync_directory(parent)
            except OSError:
                if self.target.exists():
                    os.rename(self.target, self._aside)
                os.rename(old, self.target)
                raise
        # The new artifact stands. What fails from here on is only litter, and the next writer clears it.
        shutil.rmtree(old, ignore_errors=True)
