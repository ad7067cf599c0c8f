"""Every test that a page names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("reliability.rst", "security.rst")]
NAMED = re.compile(r"``(tests/[\w/]+\.py)::(\w+)``")


@cache
def collected(path: Path) -> frozenset[str]:
    """The tests of a file that pytest collects."""
    if not (path.is_file() and path.name.startswith("test_")):
        return frozenset()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def named(page: Path) -> list[tuple[str, str]]:
    return NAMED.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    found = named(page)
    assert len(found) > 15
    missing = [f"{file}::{test}" for file, test in found if test not in collected(ROOT / file)]
    assert not missing
    # Nothing that looks like a test escapes the search.
    assert len(found) == page.read_text(encoding="utf-8").count("::test_") - _console(page)


def _console(page: Path) -> int:
    return len(re.findall(r"pytest tests/[\w/]+\.py::test_", page.read_text(encoding="utf-8")))


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "reliability.rst").read_text(encoding="utf-8")
    tables = re.findall(
        r"\.\. list-table::\n   :header-rows: 1\n   :class: promises\n(.*?)\n\n\S", text, re.S
    )
    rows = [row for table in tables for row in table.split("\n   * - ")[2:]]
    assert len(rows) > 30
    for row in rows:
        _, held, where = row.split("\n     - ")
        assert NAMED.search(held), row
        assert where.strip(), row
