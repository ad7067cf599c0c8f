"""The experiments page: every table and plot comes from the committed file."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from telme_kd import __version__

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / __version__


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    return importlib.import_module("experiment_results")


@pytest.mark.parametrize("corpus", ["meld", "iemocap"])
def test_a_page_has_every_table_and_plot_of_the_committed_run(
    pages: ModuleType, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.erc.plots.DENSITY", 1)
    path = RESULTS / f"experiments--{corpus}--features.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["seeds"] == [0, 1, 2, 3, 4]
    text = pages.page(corpus, path, tmp_path)
    for paper in ("Table 2", "Table 3", "Table 4", "Tables 5 to 7", "Fig. 5", "Fig. 6", "Fig. 7"):
        assert f"\n{paper}: " in f"\n{text}"
    assert text.count(".. list-table::") == 9
    assert "Left out: prompt" in text
    pictures = {found.name for found in tmp_path.glob("*.png")}
    assert len(pictures) == 2 * 10
    assert all(f"/_generated/{name}" in text for name in pictures)
    assert document["command"] in text


def test_without_a_committed_run_the_page_says_so(pages: ModuleType, tmp_path: Path) -> None:
    text = pages.page("meld", tmp_path / "none.json", tmp_path)
    assert text.startswith(".. note::")
    assert "No experiments on MELD" in text
