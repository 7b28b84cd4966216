"""One renderer with three faces: rich tables on a terminal, aligned plain lines in a pipe, JSON on demand."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

SCHEMA = 1


@dataclass(frozen=True)
class Column:
    """A column: its heading, how a value is written, and whether numbers stand to the right.

    `dispensable`: a terminal too narrow for the table goes without the column of the highest number first; 0 stays.
    """

    title: str
    write: Callable[[Any], str] = str
    right: bool = False
    dispensable: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of raw values under columns. None is written as `-`."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[str]]:
        """Every row as text."""
        return [
            ["-" if value is None else column.write(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Text:
    """A titled block of lines, written as they are."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Document:
    """What a command shows.

    Attributes:
        report: name of the kind of report; with `schema` it tells a reader of the JSON what to expect.
        data: the JSON face, complete.
        blocks: the faces for people.
    """

    report: str
    data: Mapping[str, Any]
    blocks: Sequence[Table | Text] = field(default=())

    def to_json(self) -> str:
        """One object with `schema` and `report` first."""
        data = {"schema": SCHEMA, "report": self.report, **self.data}
        return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become the texts `inf`, `-inf`, `nan`, as in the artifact's records."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(document: Document, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Write a document to `stream` (stdout) with the face that fits."""
    stream = stream if stream is not None else sys.stdout
    if as_json:
        print(document.to_json(), file=stream)
    elif stream.isatty() and importlib.util.find_spec("rich") is not None:
        _show_rich(document, stream)
    else:
        _show_plain(document, stream)


def _show_plain(document: Document, stream: TextIO) -> None:
    for number, block in enumerate(document.blocks):
        if number:
            print(file=stream)
        if block.title:
            print(block.title, file=stream)
        if isinstance(block, Text):
            for line in block.lines:
                print(line, file=stream)
            continue
        rows = [[column.title for column in block.columns], *block.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(block.columns))]
        for row in rows:
            cells = [
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(row, widths, block.columns, strict=True)
            ]
            print("  ".join(cells).rstrip(), file=stream)


def _show_rich(document: Document, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    console = Console(file=stream, highlight=False)
    for block in document.blocks:
        if isinstance(block, Text):
            if block.title:
                console.print(RichText(block.title, style="bold"))
            for line in block.lines:
                console.print(RichText(line, style=_line_style(line)), soft_wrap=True)
            console.print()
            continue
        shown = _fitting(block, console.width)
        hidden = len(block.columns) - len(shown)
        more = f"  ({hidden} columns do not fit)" if hidden else ""
        title = RichText(block.title, style="bold").append(more, style="dim") if block.title or more else None
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(block.columns[i] for i in shown):
            # The name is what a row is about: it is the last to give way on a narrow terminal.
            justify: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(
                column.title, justify=justify, no_wrap=number == 0, overflow="ellipsis" if number == 0 else "fold"
            )
        for row in block.cells():
            table.add_row(*(RichText(row[i]) for i in shown))
        console.print(table)


def _fitting(table: Table, width: int) -> list[int]:
    """Which columns are shown on a terminal of that width."""
    rows = [[column.title for column in table.columns], *table.cells()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    shown = list(range(len(table.columns)))
    for leaving in sorted(shown, key=lambda i: -table.columns[i].dispensable):
        # Two spaces between columns, one at either edge.
        if sum(widths[i] + 2 for i in shown) + 1 <= width or not table.columns[leaving].dispensable:
            break
        shown.remove(leaving)
    return shown


def _line_style(line: str) -> str:
    return {"+": "green", "-": "red", "~": "yellow"}.get(line[:1], "") if line[1:2] == " " else ""


# How values are written


def size(value: float) -> str:
    """Bytes for people: `512 B`, `36.0 KiB`, `3.2 GiB`; negative ones too."""
    amount, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(amount) >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def count(value: float) -> str:
    """`5,480,000`."""
    return f"{value:,}"


def decimals(digits: int) -> Callable[[float], str]:
    """A writer with that many decimals."""
    return lambda value: f"{value:.{digits}f}"


def signed(write: Callable[[float], str]) -> Callable[[float], str]:
    """A writer for changes: the sign is always there, and no change is `0`."""
    return lambda value: "0" if not value else ("+" if value > 0 else "") + write(value)


def shape(value: Sequence[Any]) -> str:
    """`256×64`."""
    return "×".join(map(str, value)) if value else "scalar"
