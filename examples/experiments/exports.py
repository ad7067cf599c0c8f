"""A table for a paper: LaTeX with booktabs, and CSV; and reStructuredText for these pages."""

import csv
import io
import re
from collections.abc import Iterator

from examples.erc.comparison import Cell, Probability, Spread, Table, words

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': r"{\char34}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": r"$-$",
    "\N{EN DASH}": "--",
    "\N{NO-BREAK SPACE}": "~",
}
"""What LaTeX would read as something else, or has no letter for."""


def latex(table: Table, corpus: str) -> str:
    """Write a table as a float of LaTeX, for the packages booktabs and, with accents, inputenc.

    Args:
        table: Any; its note becomes part of the caption.
        corpus: As people write it.

    Returns:
        Lines, the last with its line break; every text is escaped.
    """
    alignment = "l" * table.labels + "r" * (len(table.columns) - table.labels)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(f'{corpus}: {table.title}. {table.note}')}}}",
        rf"\label{{tab:{_label(corpus)}-{_label(table.key)}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(escape_latex(column.title) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = []
        for index, (cell, column) in enumerate(zip(row.cells, table.columns, strict=True)):
            text = escape_latex(_told(cell, column.decimals))
            cells.append(rf"\textbf{{{text}}}" if table.best(row, index) else text)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def escape_latex(text: str) -> str:
    """Make a text stand for itself in LaTeX; control characters become blanks.

    Args:
        text: Any text.

    Returns:
        LaTeX of one line.
    """
    return "".join(_LATEX.get(sign, sign if sign.isprintable() else " ") for sign in text)


def csv_table(table: Table) -> str:
    """Write a table as comma-separated values, after RFC 4180.

    Means and standard deviations have columns of their own, in percent; what is empty is empty.

    Args:
        table: Any.

    Returns:
        Lines that end in a carriage return and a line feed.
    """
    spreads = [
        any(isinstance(row.cells[index], Spread) for row in table.rows)
        for index in range(len(table.columns))
    ]
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(
        [
            head
            for column, wide in zip(table.columns, spreads, strict=True)
            for head in ((column.title, f"{column.title}, sd") if wide else (column.title,))
        ]
    )
    for row in table.rows:
        writer.writerow(
            [
                value
                for cell, wide in zip(row.cells, spreads, strict=True)
                for value in _values(cell, wide)
            ]
        )
    return written.getvalue()


def rst(table: Table, corpus: str) -> str:
    """Write a table as a ``list-table`` of reStructuredText, without its note.

    Args:
        table: Any.
        corpus: As people write it.

    Returns:
        Lines, the last with its line break.
    """
    lines = [
        f".. list-table:: {escape_rst(f'{corpus}: {table.title}')}",
        "   :header-rows: 1",
        f"   :class: numbers-from-{table.labels + 1}",
        "",
    ]
    heads = [escape_rst(column.title) for column in table.columns]
    rows = [
        [
            f"**{_told(cell, column.decimals)}**"
            if table.best(row, index)
            else escape_rst(_told(cell, column.decimals))
            for index, (cell, column) in enumerate(zip(row.cells, table.columns, strict=True))
        ]
        for row in table.rows
    ]
    for cells in (heads, *rows):
        lines += [
            f"   {'  ' if index else '* '}- {cell}".rstrip() for index, cell in enumerate(cells)
        ]
    return "\n".join([*lines, ""])


def escape_rst(text: str) -> str:
    """Escape inline markup, and the two colons that would open a literal block.

    Args:
        text: One line.
    """
    return re.sub(r"([\\`*_|]|:(?=:))", r"\\\1", text)


def _told(cell: Cell, decimals: int) -> str:
    return "" if cell is None else words(cell, decimals)


def _values(cell: Cell, wide: bool) -> Iterator[object]:
    if isinstance(cell, Spread):
        yield round(100 * cell.mean, 6)
        yield "" if cell.deviation is None else round(100 * cell.deviation, 6)
    elif isinstance(cell, Probability):
        yield cell.value
    else:
        yield "" if cell is None else cell
        if wide:
            yield ""


def _label(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
