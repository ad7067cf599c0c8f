"""The report of a run: JSON, Markdown, pictures, and one HTML file that needs nothing beside it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from examples.erc import plots
from examples.erc.comparison import (
    SPLIT,
    Cell,
    Difference,
    Spread,
    Table,
    ablation,
    combinations,
    concatenated,
    difference,
    every_system,
    headline,
    legend,
    parts,
    spread,
    tables,
    weighted_f1,
    words,
)
from examples.erc.errors import InputError
from examples.erc.findings import findings
from examples.erc.page import templates
from examples.erc.results import Results, as_text, read

if TYPE_CHECKING:  # it needs the training library
    from examples.erc.mistakes import Analysis

PRINTED = ("system", "weighted_f1", "macro_f1", "accuracy", "against_teacher")
"""The columns that the table at the end of a run has room for."""


def write(results: Mapping[str, Any], folder: Path, mistakes: "Analysis | None" = None) -> Path:
    """Write the report of a run.

    Everything is checked and made in memory before the first file is written, and each file
    appears whole or not at all. The folder receives ``plots/*.png``, ``report.json`` (the results,
    and the tables under ``"tables"``), ``report.md`` and, last, ``report.html``.

    Args:
        results: As the pipeline returns them; see :func:`examples.erc.results.read`.
        folder: Where to write; made if absent.
        mistakes: What the systems get wrong; ``None``: the report says nothing about it.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: The results do not hold together, or the folder is a file; nothing was written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder: expected a folder, got the file {folder}; name another place")
    checked = read(results)
    page = _page(checked) | {"mistakes": mistakes}
    files = {
        f"plots/{picture.name}.png": picture.light
        for gallery in page["galleries"]
        for picture in gallery.pictures
    }
    files |= {
        name: content.encode(errors="backslashreplace")
        for name, content in (
            ("report.json", _json(checked)),
            ("report.md", _filled("report.md.jinja", page, _md_escaped)),
            ("report.html", _filled("report.html.jinja", page, None)),
        )
    }
    # Imported here, so that tables can be made where there is no training library.
    from examples.erc.artifacts import replace

    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, partial(Path.write_bytes, data=content))
    return folder / "report.html"


def table(results: Mapping[str, Any]) -> str:
    """Write the scores of all systems as plain text, for a terminal.

    Args:
        results: As the pipeline returns them, or a ``report.json``.

    Returns:
        Several lines without a final line break, 80 to 120 characters wide with usual titles.

    Raises:
        InputError: The results do not hold together.
    """
    checked = read(results)
    full = every_system(checked)
    shown = [i for i, column in enumerate(full.columns) if column.key in PRINTED]
    grid = [[full.columns[i].title.replace("Against text", "vs") for i in shown]]
    grid += [[_printed(row.cells[i]) for i in shown] for row in full.rows]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in grid
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    several = len(checked.seeds) > 1
    seeds = f"mean ± sd over {len(checked.seeds)} seeds" if several else "one seed"
    return "\n".join(
        (
            f"{checked.title}: test split, epochs selected on dev; percent, {seeds}",
            "",
            *lines,
            *(("", "~ smaller than its own sd over seeds") if several else ()),
        )
    )


def rst_tables(results: Mapping[str, Any]) -> str:
    """Write the headline, the ablation and the modalities as reStructuredText.

    Args:
        results: As the pipeline returns them, or a ``report.json``.

    Returns:
        One ``list-table`` for each that the systems at hand can fill, and a paragraph on how to
        read them; it ends with a line break.

    Raises:
        InputError: The results do not hold together.
    """
    checked = read(results)
    made = (headline(checked), ablation(checked), combinations(checked))
    pieces = [_rst_table(table, checked.title) for table in made if table.rows]
    return "\n\n".join((*pieces, _rst_escaped(f"{SPLIT} {legend(checked)}"))) + "\n"


def _page(results: Results) -> dict[str, Any]:
    """What the templates are filled with."""
    return {
        "results": results,
        "split": SPLIT,
        "legend": legend(results),
        "findings": findings(results),
        "tiles": list(_tiles(results)),
        "facts": list(_facts(results)),
        "tables": {table.key: table for table in tables(results)},
        "galleries": plots.galleries(results),
        "light": plots.LIGHT,
        "dark": plots.DARK,
    }


def _tiles(results: Results) -> Iterator[tuple[str, Spread]]:
    """The few figures to see first."""
    method, teacher = results.method, results.teacher
    if method:
        yield "TelME, weighted F1", spread(method.runs, weighted_f1)
    if teacher:
        yield "Text teacher, weighted F1", spread(teacher.runs, weighted_f1)
    if method:
        for name, other in (
            ("TelME less text teacher", teacher),
            ("Shifting less concatenation", concatenated(results, method)),
        ):
            gap = difference(method, other)
            if gap:
                yield name, gap


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    """What was run, as names and values."""
    yield "Corpus", results.title
    yield "Classes", ", ".join(results.labels)
    counts = (f"{split} {count:,}" for split, count in results.counts.items())
    yield "Utterances", ", ".join(counts)
    yield "Recipe", results.recipe
    yield "Seeds", ", ".join(map(str, results.seeds))
    yield "Systems", str(len(results.systems))
    for path, value in _leaves(results.source):
        yield f"Source: {path}", value
    yield "Versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield "Time", _duration(results.seconds)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested JSON into dotted paths and values."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            yield from _leaves(held, f"{path}.{key}" if path else key)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _json(results: Results) -> str:
    document = results.document | {
        "tables": {
            table.key: [
                {"key": row.system}
                | {
                    column.key: _json_cell(cell)
                    for column, cell in zip(table.columns, row.cells, strict=True)
                }
                for row in table.rows
            ]
            for table in tables(results)
        }
    }
    return as_text(document)


def _json_cell(cell: Cell) -> object:
    if isinstance(cell, Difference):
        return asdict(cell) | {"verdict": cell.verdict}
    return asdict(cell) if isinstance(cell, Spread) else cell


def _filled(
    template: str, page: Mapping[str, Any], escaped: Callable[[object], Markup] | None
) -> str:
    environment = templates(escaped)
    environment.filters |= {"parts": parts, "told": _told}
    environment.tests["difference"] = lambda cell: isinstance(cell, Difference)
    return environment.get_template(template).render(page)


def _md_escaped(value: object) -> Markup:
    """Escape a value for Markdown, which reads HTML as well."""
    if isinstance(value, Markup):
        return value
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text))


def _rst_escaped(text: str) -> str:
    """Escape inline markup, and the two colons that would open a literal block."""
    return re.sub(r"([\\`*_|]|:(?=:))", r"\\\1", text)


def _told(cell: Cell, decimals: int = 2) -> str:
    """Write a cell with its verdict, if it has one."""
    text = words(cell, decimals)
    return f"{text} ({cell.verdict})" if isinstance(cell, Difference) else text


def _printed(cell: Cell) -> str:
    text = words(cell).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    if not isinstance(cell, Difference) or cell.deviation is None:
        return text
    return text + (" ~" if cell.verdict == "within the spread" else "  ")


def _rst_table(table: Table, corpus: str) -> str:
    lines = [
        _rst_escaped(table.note),
        "",
        f".. list-table:: {_rst_escaped(f'{corpus}: {table.title}')}",
        "   :header-rows: 1",
        "",
    ]
    rows = [[column.title for column in table.columns]]
    rows += [
        [
            f"**{_told(cell, column.decimals)}**"
            if table.best(row, index)
            else _rst_escaped(_told(cell, column.decimals))
            for index, (cell, column) in enumerate(zip(row.cells, table.columns, strict=True))
        ]
        for row in table.rows
    ]
    for cells in rows:
        lines += [f"   {'  ' if index else '* '}- {cell}" for index, cell in enumerate(cells)]
    return "\n".join(lines)
