"""Session options with the op library registered, and the check of ONNX Runtime's version."""

from __future__ import annotations

import re
import warnings

import onnxruntime

from qcompiler.errors import UnsupportedError, UsageError
from qcompiler.runtime import library

MINIMUM = (1, 21)
MINIMUM_PORTABLE = (1, 27)

_warned_portable = False


def check_onnxruntime(version: str | None = None) -> None:
    """Raise `UnsupportedError` when ONNX Runtime (`version`, default the installed one) is older than 1.21.

    The op library is built against the interface of 1.21, and attention with positions and a bias needs it too.
    """
    found = onnxruntime.__version__ if version is None else version
    if not _at_least(found, MINIMUM):
        wanted = _text(MINIMUM)
        raise UnsupportedError(
            f"onnxruntime is {found}, expected {wanted} or newer: pip install 'onnxruntime>={wanted}'"
        )


def check_portable(version: str | None = None) -> None:
    """Raise `UnsupportedError` when ONNX Runtime (`version`, default the installed one) cannot do without the library.

    Before 1.27 it ignores the `overload` of a node, so of several function bodies of one op it knows only one. It would
    refuse a model with several at load, in words that lead nowhere.
    """
    found = onnxruntime.__version__ if version is None else version
    if not _at_least(found, MINIMUM_PORTABLE):
        wanted = _text(MINIMUM_PORTABLE)
        raise UnsupportedError(
            f"onnxruntime is {found}, running without the op library (portable) needs {wanted} or newer: "
            f"pip install 'onnxruntime>={wanted}', or run with the op library"
        )


def _at_least(version: str, minimum: tuple[int, int]) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= minimum


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def session_options(threads: int | None = None, *, portable: bool = False) -> onnxruntime.SessionOptions:
    """Options for an `onnxruntime.InferenceSession` that runs our artifacts, for code with a session of its own.

    Args:
        threads: threads inside an operator; None leaves it to ONNX Runtime (one for each core).
        portable: do not register the op library. The graph then runs through the function bodies that it carries:
            the same results (bit for bit with int8 activations, to rounding with float ones), and slow; said once in
            a warning.

    Raises:
        LibraryError: the op library is missing or does not fit this version.
        UnsupportedError: ONNX Runtime is too old.
    """
    check_onnxruntime()
    if portable:
        check_portable()
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
    # Products of uint8 with int8 saturate on x86 without VNNI; this makes ONNX Runtime take its exact kernels there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _warn_portable() -> None:
    global _warned_portable
    if not _warned_portable:
        _warned_portable = True
        text = "running without the op library: the same results, but slow, since every quantized layer is decoded"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
