"""Annotation tables, read strictly, and the files that they stand for."""

import csv
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from examples.erc.errors import InputError

_SHOWN = 60
"""How many characters of a faulty cell an error shows."""

_SHOWN_HEADER = 400
"""How many characters of a header without a column an error shows."""

_DIGITS = 9
"""How many digits a whole number may have."""


_MOST_BYTES = 1 << 26
"""The largest file of annotations that is read: 64 MiB; those of MELD have 1.6 at most."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        path: The table.
        line: Its number, 1 for the header.
        cells: The value in each column.
    """

    path: Path
    line: int
    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        """A cell that must not be blank, without the blanks around it.

        Raises:
            InputError: It is blank.
        """
        value = self.cells[column].strip()
        if not value:
            self.refuse(column, "some text", "fill it in or remove the line")
        return value

    def integer(self, column: str) -> int:
        """A whole number in [0, 10**9), in digits alone.

        Raises:
            InputError: It is anything else.
        """
        value = self.text(column)
        # int() would also take signs, underscores, other scripts and thousands of digits.
        if not (value.isascii() and value.isdigit() and len(value) <= _DIGITS):
            self.refuse(column, f"a whole number of at most {_DIGITS} digits", "mend the number")
        return int(value)

    def seconds(self, column: str) -> float:
        """A finite number of seconds, >= 0.

        Raises:
            InputError: It is anything else.
        """
        try:
            value = float(self.text(column))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            self.refuse(column, "a finite number of seconds >= 0", "mend the number")
        return value

    def index(self, column: str, labels: Sequence[str]) -> int:
        """The index of a cell among the labels.

        Raises:
            InputError: It is none of them.
        """
        value = self.text(column)
        if value not in labels:
            self.refuse(column, f"one of {', '.join(labels)}", "correct the label")
        return labels.index(value)

    def refuse(self, column: str, expected: str, remedy: str) -> NoReturn:
        """Say in one line what is wrong with a cell.

        Raises:
            InputError: Always.
        """
        got = self.cells[column]
        shown = repr(got if len(got) <= _SHOWN else got[:_SHOWN] + "...")
        raise InputError(
            f"{self.path}, line {self.line}, column {column!r}: "
            f"expected {expected}, got {shown}; {remedy}"
        )


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """Read a CSV table: UTF-8, a header, one line for each row.

    A quoted cell must not contain a line break: no corpus here has one, and a quotation mark that
    is never closed would otherwise swallow the lines that follow it.

    Args:
        path: The table.
        columns: The columns that are needed; others may be there as well.
        optional: Columns that need not be there, but not twice either.

    Returns:
        The rows, at least one, with all their columns. Blank lines are left out.

    Raises:
        InputError: The file cannot be read as such a table; the message says where and why.
    """
    lines = _decode(path).split("\n")
    header = _cells(path, 1, lines[0])
    for column in (*columns, *(column for column in optional if column in header)):
        if header.count(column) != 1:
            names = ", ".join(map(repr, header))[:_SHOWN_HEADER] or "nothing"
            got = "it twice" if column in header else names
            raise InputError(
                f"{path}, line 1: expected one column {column!r}, got {got}; "
                "use the table as it was published"
            )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.rstrip("\r"):
            continue
        cells = _cells(path, number, line, header)
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {number}, column {header[min(len(cells), len(header)) - 1]!r}: "
                f"expected {len(header)} cells in the line, got {len(cells)}; "
                "quote the cells that contain commas"
            )
        row = Row(path, number, dict(zip(header, cells, strict=True)))
        for column, cell in row.cells.items():
            if "\0" in cell:
                row.refuse(column, "text", "remove the NUL character")
        rows.append(row)
    if not rows:
        raise InputError(
            f"{path}, line 2: expected at least one utterance, got none; "
            "use the table as it was published"
        )
    return rows


def read_bytes(path: Path, expected: str) -> bytes:
    """Read a file of annotations.

    Args:
        path: The file.
        expected: What it should be, for the message: "a CSV table".

    Raises:
        InputError: It cannot be read, is no regular file, or is far larger than any such file.
    """
    try:
        status = path.stat()
        # Reading from a pipe would wait for ever.
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: expected {expected}, got an error ({error.strerror}); check the path"
        ) from error
    raise InputError(
        f"{path}: expected {expected}, a file of at most {_MOST_BYTES} bytes, got "
        f"{stat.filemode(status.st_mode)} of {status.st_size} bytes; use the file as published"
    )


def _decode(path: Path) -> str:
    data = read_bytes(path, "a CSV table")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        byte = error.start - (before.rfind(b"\n") + 1) + 1
        raise InputError(
            f"{path}, line {line}, byte {byte}: expected UTF-8, got 0x{data[error.start]:02x}; "
            "save the table as UTF-8"
        ) from error


def _cells(path: Path, number: int, line: str, header: Sequence[str] = ()) -> list[str]:
    try:
        return _split(line)
    except csv.Error as error:
        column = _count_whole_cells(line)
        where = repr(header[column]) if column < len(header) else str(column + 1)
        raise InputError(
            f"{path}, line {number}, column {where}: expected a whole cell, got a fault ({error}); "
            "close the quotation mark, or double it inside a cell"
        ) from error


def _split(line: str) -> list[str]:
    return next(csv.reader([line.removesuffix("\r")], strict=True), [])


def _count_whole_cells(line: str) -> int:
    """How many cells stand before the first fault of a line."""
    count = 0
    for end in (position for position, letter in enumerate(line) if letter == ","):
        try:
            count = len(_split(line[:end]))
        except csv.Error:
            # This comma may stand inside a quoted cell that ends further on.
            continue
    return count


def locate(root: Path, name: str) -> Path:
    """The place of a file under a root, whether it is there or not.

    Args:
        root: The folder of the corpus.
        name: The path of the file, relative to the root.

    Returns:
        The absolute path, with links resolved.

    Raises:
        InputError: The path leaves the root, be it by ``..``, as an absolute path or by a link.
    """
    home = root.resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home):
        raise InputError(
            f"{root / name}: expected a file under {root}, got {path}; "
            "put the file itself there instead of a link or a path to another place"
        )
    return path
