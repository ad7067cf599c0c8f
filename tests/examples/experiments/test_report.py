import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from PIL import Image

from examples.erc import plots
from examples.erc.comparison import Difference, Probability, Spread
from examples.erc.errors import InputError
from examples.experiments import tables
from examples.experiments.catalogue import EXPERIMENTS
from examples.experiments.outcome import read
from examples.experiments.report import exhibits, summary, write
from examples.experiments.significance import holm
from tests.examples.experiments.conftest import Ran

KEYS = {
    *("comparison", "ablation", "modalities", "teacher", "students_by_teacher"),
    *("students", "classes", "confusions", "confusions_by_class"),
}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw fewer pixels, which is faster."""
    monkeypatch.setattr(plots, "DENSITY", 1)


def filled(document: Any, name: str) -> tables.Table:
    outcome = read(document)
    return tables.table(EXPERIMENTS[name].plan(outcome.modalities)[0], outcome)


def test_a_run_leaves_a_page_and_a_table_of_each_kind(ran: Ran) -> None:
    folder = ran.folder / "experiments" / "all"
    assert ran.result.exit_code == 0, ran.result.stderr
    assert ran.result.stdout.rstrip().endswith(str(folder / "report.html"))
    for kind in ("csv", "tex"):
        assert {path.stem for path in (folder / "tables").glob(f"*.{kind}")} == KEYS
    for picture in (folder / "plots").glob("*.png"):
        with Image.open(picture) as image:
            assert image.size[0] > 100
    assert len(list((folder / "plots").iterdir())) == 7 + 3


class Page(HTMLParser):
    """Which anchors and places there are, and what a page fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.alternatives: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found["href"])] if "href" in found else []
        self.fetched += [str(value) for key, value in attrs if key in ("src", "srcset")]
        self.alternatives += [str(found.get("alt"))] if tag == "img" else []


def test_the_page_needs_nothing_beside_it(ran: Ran) -> None:
    text = (ran.folder / "experiments" / "all" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert page.fetched
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert all(len(alternative) > 30 for alternative in page.alternatives)
    assert "Prompt" in text
    assert "got sentence embeddings" in text


def test_scores_are_means_and_deviations_over_seeds(document: Any) -> None:
    table = filled(document, "ablation")
    heads = [column.key for column in table.columns]
    by_key = {system["key"]: system for system in document["systems"]}
    for row in table.rows:
        values = [run["test"]["weighted_f1"] for run in by_key[row.system]["runs"]]
        cell = row.cells[heads.index("weighted_f1")]
        assert isinstance(cell, Spread)
        assert cell.mean == pytest.approx(fmean(values))
        assert cell.deviation == pytest.approx(stdev(values))


def test_differences_and_probabilities_are_those_against_the_baseline(document: Any) -> None:
    table = filled(document, "ablation")
    heads = [column.key for column in table.columns]
    by_key = {system["key"]: system for system in document["systems"]}
    baseline = by_key["text+audio+visual/concatenation/none"]
    tests = {(t["system"], t["baseline"]): t for t in document["significance"]}
    found = [tests[row.system, baseline["key"]] for row in table.rows[1:]]
    expected = holm([max(test["seeds"], test["dialogues"]) for test in found])
    for row, adjusted in zip(table.rows[1:], expected, strict=True):
        gaps = [
            ours["test"]["weighted_f1"] - theirs["test"]["weighted_f1"]
            for ours, theirs in zip(by_key[row.system]["runs"], baseline["runs"], strict=True)
        ]
        gap = row.cells[heads.index("difference")]
        assert isinstance(gap, Difference)
        assert gap.mean == pytest.approx(fmean(gaps))
        assert row.cells[heads.index("p_holm")] == Probability(adjusted)
    assert table.rows[0].cells[heads.index("p_holm")] is None


def test_a_difference_is_called_what_its_probability_and_its_sign_say(document: Any) -> None:
    for test in document["significance"]:
        certain = "shifting/none" in test["system"] or "shifting/feature" in test["system"]
        test["seeds"] = test["dialogues"] = 0.0001 if certain else 0.9
    better, worse = (
        next(s for s in document["systems"] if s["key"] == f"text+audio+visual/shifting/{taught}")
        for taught in ("none", "feature")
    )
    for system, score in ((better, 0.999), (worse, 0.001)):
        for run in system["runs"]:
            run["test"]["weighted_f1"] = score
    table = filled(document, "ablation")
    verdicts = [row.cells[-1] for row in table.rows]
    assert verdicts == [None, *[tables.CHANCE] * 3, "better", tables.CHANCE, "worse", tables.CHANCE]
    outcome = read(document)
    said = tables.finding(EXPERIMENTS["ablation"].plan(outcome.modalities)[0], outcome)
    assert "Better than the baseline: shifting, none." in said
    assert "Worse than the baseline: shifting, feature." in said
    assert "5 of 7 differences from the baseline may be chance." in said


def test_published_scores_stand_beside_ours_with_their_sources(document: Any) -> None:
    table = filled(document, "comparison")
    heads = [column.key for column in table.columns]
    published = {row.system: row.cells[heads.index("published")] for row in table.rows}
    assert published["TelME, as published"] == Spread(0.6737, None, 1)
    assert published["text"] is None
    assert "Yun et al., NAACL 2024, Table 2" in table.note
    assert len({len(row.cells) for row in table.rows} | {len(table.columns)}) == 1
    # What others published is not what is best here.
    assert not any(table.best(row, heads.index("published")) for row in table.rows)


def test_classes_have_scores_of_their_own(document: Any) -> None:
    outcome = read(document)
    (comparison,) = EXPERIMENTS["confusions"].plan(outcome.modalities)
    table = tables.class_scores(comparison, outcome)
    assert [column.title for column in table.columns] == [
        "System",
        "glad (3)",
        "sad (9)",
        "calm (9)",
    ]
    system = next(s for s in document["systems"] if s["key"] == table.rows[2].system)
    values = [run["test"]["per_class_f1"][1] for run in system["runs"]]
    assert table.rows[2].cells[2] == Spread(fmean(values), stdev(values), 2)


def test_narrow_tables_keep_what_a_paper_needs(document: Any) -> None:
    keys = [column.key for column in tables.narrow(filled(document, "students")).columns]
    assert keys == [
        *("student", "distillation", "weighted_f1", "macro_f1", "accuracy"),
        *("difference", "p_holm"),
    ]


def test_one_seed_has_no_test_over_seeds(document: Any) -> None:
    document["seeds"] = [0]
    for system in document["systems"]:
        del system["runs"][1:]
    for test in document["significance"]:
        test["seeds"] = None
    table = filled(document, "students")
    assert "p_seeds" not in [column.key for column in table.columns]
    assert "One seed" in tables.legend(read(document))


def test_classes_are_counted_and_drawn(document: Any) -> None:
    document["experiments"] = ["classes"]
    outcome = read(document)
    table = tables.class_table(outcome)
    assert [row.cells[1] for row in table.rows] == [14, 13, 13]
    assert sum(float(str(row.cells[2])) for row in table.rows) == pytest.approx(100)
    (shown,) = exhibits(outcome)
    assert "train: glad 14, sad 13, calm 13" in shown.pictures[0].alt


def test_every_table_is_in_the_files(ran: Ran, document: Any) -> None:
    outcome = read(document)
    folder = ran.folder / "experiments" / "all" / "tables"
    for experiment in outcome.experiments:
        for comparison in experiment.plan(outcome.modalities):
            rows = 1 + len(tables.table(comparison, outcome).rows)
            text = (folder / f"{comparison.key}.csv").read_text(encoding="utf-8")
            assert len(list(csv.reader(io.StringIO(text)))) == rows
            tex = (folder / f"{comparison.key}.tex").read_text(encoding="utf-8")
            assert tex.count(r"\\") == rows


def test_titles_may_hold_any_sign(document: Any, tmp_path: Path) -> None:
    sign = r"<b>\glad & $x_1$ % #|`*`"
    document["experiments"] = ["students", "classes"]
    text = json.dumps(document).replace('"glad"', json.dumps(sign))
    page = write(json.loads(text), tmp_path).read_text(encoding="utf-8")
    assert "<b>" not in page
    assert r"\textbackslash{}glad \& \$x\_1\$ \% \#" in (
        tmp_path / "tables" / "classes.tex"
    ).read_text(encoding="utf-8")


def test_broken_results_write_nothing(document: Any, tmp_path: Path) -> None:
    document["classes"]["dev"]["sad"] += 1
    with pytest.raises(InputError, match="counts that add up"):
        write(document, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(document: Any, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="expected a folder, got the file"):
        write(document, tmp_path / "out")


def test_the_summary_has_a_line_for_each_table_and_each_reason(document: Any) -> None:
    lines = summary(document).splitlines()
    assert len(lines) == 9
    assert re.match(r"Ablation \(Table 3\): Highest mean: ", lines[1])
    assert lines[-1].startswith("Prompt (Table 8): left out; features.npz: expected words")
