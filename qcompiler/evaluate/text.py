"""The text that models are calibrated and evaluated on: `pydoc_data.topics` of the user's Python, or the user's files.

`pydoc_data.topics` is the language reference behind `help("...")`: technical English that comes with every Python, so
nothing is downloaded and nothing is bundled. Sorted by name, its first two thirds are for calibration and its last
third for evaluation: the two never share a topic. It changes a little with the version of Python, so the description
of a text names the version.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcompiler.errors import InputError, UsageError


@dataclass(frozen=True)
class Text:
    """One stream of text. Documents are joined by a blank line, without any special token between them.

    Attributes:
        content: the text.
        description: one line for records: where it comes from, never a quotation of it.
    """

    content: str
    description: str


def calibration_text() -> Text:
    """The first two thirds of the topics by name."""
    topics = _topics()
    return _join(topics[: _cut(topics)], "first two thirds")


def evaluation_text() -> Text:
    """The last third of the topics by name."""
    topics = _topics()
    return _join(topics[_cut(topics) :], "last third")


def read_text(files: str | os.PathLike | Iterable[str | os.PathLike]) -> Text:
    """The user's files (UTF-8), in the order given.

    Raises:
        UsageError: no file is given.
        InputError: a file cannot be read, is not UTF-8, or all of them together hold nothing but white space.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not paths:
        raise UsageError("no text file is given: expected at least one")
    documents = []
    for path in paths:
        name = os.fspath(path)
        try:
            with open(name, encoding="utf-8-sig") as file:  # an editor's byte order mark is no text
                documents.append(file.read())
        except UnicodeDecodeError as error:
            raise InputError(
                f"text file {name!r} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
                "convert it first"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InputError(f"cannot read text file {name!r}: {getattr(error, 'strerror', None) or error}") from error
    content = "\n\n".join(documents)
    names = ", ".join(os.path.basename(os.fspath(path)) for path in paths)
    if not content.strip():
        raise InputError(f"there is no text in {names}")
    return Text(content, names)


def as_text(text: Text | str | os.PathLike | Iterable[str | os.PathLike] | None, default: Callable[[], Text]) -> Text:
    """`text` itself, the files that it names, or `default()` for None."""
    if text is None:
        return default()
    return text if isinstance(text, Text) else read_text(text)


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions split it off
        raise InputError(
            "this Python comes without pydoc_data.topics, the default text; name text files with --text"
        ) from error
    return sorted(topics.items())


def _cut(topics: list) -> int:
    return 2 * len(topics) // 3


def _join(topics: list[tuple[str, str]], part: str) -> Text:
    description = f"pydoc_data.topics of Python {platform.python_version()}, {part} by name ({len(topics)} topics)"
    return Text("\n\n".join(content for _, content in topics), description)
