"""A hidden folder beside the artifact that is being made: what is solved so far, and what does not fit in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType

from qcompiler.errors import InputError, Stopped


class Workspace:
    """Context manager of `.<name>.work` beside the output. The writer's lock must be held.

    Leaving it removes the folder, unless what is solved in it is worth going on from: after `Stopped`, after an interrupt,
    and after any error of a run that was itself resumed. A run that is killed leaves it behind; the next one clears it, or
    with `resume` goes on from it.

    Args:
        target: the artifact's directory, as the writer resolved it.
        resume: take up what an earlier run has solved.
    """

    def __init__(self, target: Path, resume: bool = False):
        self.folder = target.parent / f".{target.name}.work"
        self.solved = self.folder / "solved"
        self.scratch = self.folder / "scratch"
        self._resume = resume

    def __enter__(self) -> Workspace:
        try:
            if not self._resume:
                self._remove(self.folder)
            self._remove(self.scratch)
            self.solved.mkdir(parents=True, exist_ok=True)
            self.scratch.mkdir()
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove(self.scratch)
        solved = any(self.solved.glob("*.safetensors")) if self.solved.is_dir() else False
        worth = isinstance(error, (Stopped, KeyboardInterrupt)) or (error is not None and self._resume)
        if not (worth and solved):
            self._remove(self.folder)
        elif error is not None and not isinstance(error, Stopped):
            error.add_note(f"solved layers are kept in {self.folder}; --resume goes on from them")

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; remove it")
        shutil.rmtree(path, ignore_errors=True)
