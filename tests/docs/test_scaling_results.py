"""The scaling page: what travels is checked against its formulas before anything is computed."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sphinx.errors import ExtensionError

EXTENSIONS = Path(__file__).parents[2] / "docs" / "_extensions"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module("scaling_results")


def row(world: int, provider: str, *sizes: tuple[str, int]) -> dict[str, Any]:
    """DIST of 64 items and 7 classes, and what travelled."""
    return {
        "loss": "dist",
        "items": 64,
        "width": 7,
        "world": world,
        "provider": provider,
        "seconds": {"p50": 1e-3 * world},
        "collectives": [{"name": name, "bytes": size} for name, size in sizes],
    }


ROWS = [
    row(1, "shared"),
    row(2, "shared", ("all_gather", 2 * 56), ("all_gather", 2 * 50 * 4)),
    row(1, "gathered", ("all_gather", 56), *[("all_gather", 64 * 7 * 4)] * 2),
    row(2, "gathered", ("all_gather", 2 * 56), *[("all_gather", 64 * 7 * 4)] * 2),
]


def test_measured_page_lists_times_and_bytes(pages: ModuleType) -> None:
    pages.check(ROWS)
    text = pages.measured(
        {
            "rows": ROWS,
            "machine": {"name": "Abacus", "processors": 2},
            "command": "python -m benchmarks.bench_distributed",
            "versions": {"torch": "2"},
        }
    )
    flat = " ".join(text.split())
    assert "- DIST - 64 × 7 - ``group=`` - 1 ms - 2 ms - 512" in flat
    assert "- DIST - 64 × 7 - whole batch gathered - 1 ms - 2 ms - 3,700" in flat
    assert "on 2 processors of an Abacus (torch 2)" in flat


def test_traffic_that_formulas_do_not_foresee_fails_the_build(pages: ModuleType) -> None:
    wrong = [row(2, "shared", ("all_gather", 2 * 56), ("all_reduce", 2 * 50 * 4))]
    with pytest.raises(ExtensionError, match=r"2 processes, shared, got .*measure again"):
        pages.check(wrong)


def test_bytes_round_a_ring(pages: ModuleType) -> None:
    few = pages.Part("dist", 256, 7)
    assert pages.sent(few, "shared", 8) == 7 / 8 * (8 * 56 + 8 * 50 * 4)
    many = pages.Part("dist", 256, 1000)
    reduced = 4 * (2000 + 2000 + 3001)
    assert pages.sent(many, "shared", 4) == 3 / 4 * 4 * 56 + 2 * 3 / 4 * reduced
    features = pages.Part("batch_similarity", 256, 768)
    gathered = 4 * 56 + 4 * 256 * 768 * 4
    reduced = 2 * 4 * 256 * 4 + 4
    assert pages.sent(features, "shared", 4) == 3 / 4 * gathered + 2 * 3 / 4 * reduced
    assert "- 4.3 TB" in pages.computed()  # 2 x 4 bytes x 4096 x 1024 items x 128,256 classes
