"""What the command prints. Every line goes through `printable`, since names, keys and captions come from outside.

Results go to stdout, all else to stderr. No text is markup.
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

_HARMLESS = "\u200c\u200d"  # joiners, which scripts and emoji need


def printable(text: str) -> str:
    r"""A text in which what could act on a terminal is escaped as Python writes it: \x1b[31m, a\nb."""
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in _HARMLESS or unicodedata.category(char) == "Zs"


def say(*cells: str) -> None:
    """A line of the result, with tabs between its cells."""
    _print("\t".join(map(printable, cells)), sys.stdout)


def notice(text: str) -> None:
    """A line beside the result: an error, what is skipped, what takes long."""
    line = re.sub(r"\s*\n\s*", " ", text.strip())
    with suppress(OSError):  # whoever does not hear it has the exit status
        _print(f"uniflow: {printable(line)}", sys.stderr)


def counted(pictures: int) -> str:
    """How many pictures, in words."""
    return f"{pictures} picture{'s' if pictures != 1 else ''}"


def explain_os_error(error: OSError) -> str:
    """What the system says of which file."""
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)


def _print(line: str, stream: TextIO | None) -> None:
    if stream is None:  # whoever started this has closed it
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Inside the block a warning is one line, as an error is."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        notice(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@dataclass(frozen=True)
class Column:
    """Of a table: its heading, what JSON calls it, how its numbers are written, and its least width in characters."""

    heading: str
    key: str
    format: str = ""
    width: int = 0


class Table:
    """A table whose rows are printed as they come: aligned on a terminal, elsewhere with tabs between the cells.

    Args:
        columns: of every row.
        as_json: an object of JSON a line instead.
    """

    def __init__(self, columns: Sequence[Column], as_json: bool = False) -> None:
        self.columns = columns
        self.as_json = as_json
        self._aligned = sys.stdout is not None and sys.stdout.isatty()
        self._begun = False

    def row(self, *cells: str | float) -> None:
        """One value a column."""
        if self.as_json:
            say_json({column.key: cell for column, cell in zip(self.columns, cells, strict=True)})
            return
        if not self._begun:
            self._begun = True
            self._line([column.heading for column in self.columns])
        self._line(
            [
                cell if isinstance(cell, str) else format(cell, column.format)
                for column, cell in zip(self.columns, cells, strict=True)
            ]
        )

    def _line(self, cells: Sequence[str]) -> None:
        say("  ".join(map(_padded, cells, self.columns)).rstrip()) if self._aligned else say(*cells)


def say_json(values: Mapping[str, object]) -> None:
    """A line with an object of JSON, in which numbers that are not finite are null."""
    say(json.dumps(finite(values)))


def finite(values: Mapping[str, object]) -> dict[str, object]:
    """Values as JSON has them: those that are not finite as None, also further down."""

    def of(value: object) -> object:
        if isinstance(value, Mapping):
            return finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: of(value) for key, value in values.items()}


def _padded(cell: str, column: Column) -> str:
    from rich.cells import cell_len  # some characters are two wide

    cell = printable(cell)
    padding = " " * (max(column.width, len(column.heading)) - cell_len(cell))
    return padding + cell if column.format else cell + padding
