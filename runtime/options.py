"""Session options with the op library registered, and the check of ONNX Runtime's version."""

from __future__ import annotations

import re
import warnings

import onnxruntime

from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.runtime import library

MINIMUM = (1, 21)

_warned_portable = False


def check_onnxruntime(version: str | None = None) -> None:
    """Raise `UnsupportedError` when ONNX Runtime (`version`, default the installed one) is older than 1.21.

    The op library is built against the interface of 1.21, and attention with positions and a bias needs it too.
    """
    found = onnxruntime.__version__ if version is None else version
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise UnsupportedError(
            f"onnxruntime is {found}, expected {wanted} or newer: pip install 'onnxruntime>={wanted}'"
        )


def session_options(threads: int | None = None, *, portable: bool = False) -> onnxruntime.SessionOptions:
    """Options for an `onnxruntime.InferenceSession` that runs our artifacts, for code with a session of its own.

    Args:
        threads: threads inside an operator; None leaves it to ONNX Runtime (one for each core).
        portable: do not register the op library. The graph then runs through the function bodies that it carries:
            the same to rounding, and slow; said once in a warning.

    Raises:
        LibraryError: the op library is missing or does not fit this version.
        UnsupportedError: ONNX Runtime is too old.
    """
    check_onnxruntime()
    options = plain_options(threads)
    if portable:
        _warn_portable()
    else:
        # Loading it first gives our own message where the file is damaged or of another version.
        library.load()
        options.register_custom_ops_library(str(library.library_path()))
    return options


def plain_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options without the op library, for graphs of stock operators."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, expected at least 1")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _warn_portable() -> None:
    global _warned_portable
    if not _warned_portable:
        _warned_portable = True
        text = "running without the op library: slow, since every quantized layer is decoded; the same up to rounding"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
