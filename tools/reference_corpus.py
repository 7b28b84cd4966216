"""Training text from the machine's own Python: nothing is downloaded.

Three sources: the standard library's source, what installed packages say about themselves (docstrings, and the
documents that they ship), and manual pages where there are any. `pydoc_data.topics`, the evaluation text, is kept out,
and so is every document that shares lines with it.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import random
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Shorter documents teach little; longer files are mostly tables.
SHORTEST, LONGEST = 300, 400_000
# One document in so many is held out, chosen by its content.
HELD_OUT = 50

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
    "__pycache__",
    "site-packages",
    "dist-packages",
}
_DOCUMENTS = {".md", ".rst", ".txt"}
# A line of the evaluation text that is this long does not stand elsewhere by chance.
_TELLING_LINE, _SHARED_LINES = 50, 3


def gather(megabytes: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents for training and held-out ones, `megabytes` of text together (or all that there is)."""
    evaluation = _evaluation_lines()
    sources = [_documents(paths, read, seed) for paths, read in _sources()]
    training: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    room = megabytes * 1e6
    while sources and room > 0:
        for source in list(sources):  # in turn, so that a small budget has something of each
            document = next(source, None)
            if document is None:
                sources.remove(source)
                continue
            digest = hashlib.sha256(document.encode()).digest()
            if digest in seen or _shares_lines(document, evaluation):
                continue
            seen.add(digest)
            (held_out if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else training).append(document)
            room -= len(document)
    return training, held_out


def _sources() -> list[tuple[list[Path], Callable[[Path], Iterable[str]]]]:
    library = Path(sysconfig.get_path("stdlib"))
    packages = [Path(folder) for folder in dict.fromkeys([*site.getsitepackages(), *sys.path]) if "-packages" in folder]
    installed = [path for folder in packages if folder.is_dir() for path in _walk(folder)]
    return [
        ([path for path in _walk(library) if path.suffix == ".py"], _whole),
        ([path for path in installed if path.suffix == ".py"], _docstrings),
        ([path for path in installed if path.suffix in _DOCUMENTS or path.name == "METADATA"], _whole),
        (sorted(Path("/usr/share/man").glob("man[1-8]/*")), _manual_page),
    ]


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _SKIPPED_FOLDERS:
                yield from _walk(path)
        elif path.is_file():
            yield path


def _documents(paths: list[Path], read: Callable[[Path], Iterable[str]], seed: int) -> Iterator[str]:
    random.Random(seed).shuffle(paths)
    for path in paths:
        try:
            yield from (text for text in read(path) if SHORTEST <= len(text) <= LONGEST)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, EOFError):
            continue  # unreadable files of an installation are no reason to stop


def _whole(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _docstrings(path: Path) -> list[str]:
    """All docstrings of a module as one document."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, owners) and (text := ast.get_docstring(node)) and len(text) >= 80:
            name = getattr(node, "name", path.stem)
            found.append(f"{name}\n\n{text}")
    return ["\n\n".join(found)]


def _manual_page(path: Path) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data.startswith(b".so "):  # only a reference to another page
        return []
    return [plain_manual(data.decode("utf-8"))]


def plain_manual(source: str) -> str:
    """The words of a manual page in roff, without its macros and escapes."""
    lines = []
    for line in source.splitlines():
        if re.match(r"""[.']\s*(\\"|\\#)""", line) or line.startswith("'\\\""):
            continue
        if macro := re.match(r"[.']\s*([A-Za-z]+)\s*(.*)", line):
            name, rest = macro.groups()
            if name in ("SH", "SS", "Sh", "Ss"):
                rest = "\n" + rest
            elif name in ("PP", "P", "LP", "Pp", "TP", "IP", "sp"):
                lines.append("")
                rest = rest if name == "IP" else ""
            elif name not in (
                "B",
                "I",
                "BR",
                "BI",
                "IR",
                "RB",
                "RI",
                "IB",
                "SM",
                "SB",
                "Nm",
                "Nd",
                "Fl",
                "Ar",
                "Xr",
                "It",
            ):
                continue
            # Roman and bold in turn set their arguments without spaces between them.
            words = re.findall(r'"([^"]*)"|(\S+)', rest) if name in ("BR", "BI", "IR", "RB", "RI", "IB") else []
            line = "".join(a or b for a, b in words) if words else rest.replace('"', "")
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,:%|^]|\\\".*", "", line)
        line = re.sub(r"\\\(?(?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]", "'", line)
        line = re.sub(r"\\\((?:lq|rq)|\\\[(?:lq|rq)\]", '"', line)
        line = re.sub(r"\\\((?:em|en|bu)|\\\[(?:em|en|bu)\]|\\-", "-", line)
        lines.append(line.replace("\\e", "\\").replace("\\ ", " ").rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _evaluation_lines() -> set[str]:
    from pydoc_data.topics import topics

    return {
        line.strip() for text in topics.values() for line in text.splitlines() if len(line.strip()) >= _TELLING_LINE
    }


def _shares_lines(document: str, evaluation: set[str]) -> bool:
    return sum(line.strip() in evaluation for line in document.splitlines()) >= _SHARED_LINES
