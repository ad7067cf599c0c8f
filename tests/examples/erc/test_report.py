import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from examples.erc import plots, report
from examples.erc.errors import InputError

FABRICATED = Path(__file__).with_name("results.json").read_text(encoding="utf-8")
METHOD = "text+audio+visual/shifting/response+feature"
NASTY = 'A|b *c* `d` [e](f) <script>alert(1)</script> & "g" {{ h }} $i$ _j_ k::'


@pytest.fixture
def results() -> Any:
    return json.loads(FABRICATED)


@pytest.fixture
def short(results: Any) -> Any:
    """The text teacher, the audio students, and text + audio."""
    results["systems"] = [s for s in results["systems"] if "visual" not in s["modalities"]]
    return results


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Draw fewer pixels, which is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DENSITY", 1)
        yield


@pytest.fixture
def unillustrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, where words alone are looked at."""
    monkeypatch.setattr(plots, "galleries", lambda results: [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a full report, whose folder no test writes to."""
    folder = tmp_path_factory.mktemp("runs") / "of" / "fabricated"
    return report.write(json.loads(FABRICATED), folder)


class Page(HTMLParser):
    """What an HTML file consists of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_writes_every_file_and_returns_the_page(written: Path) -> None:
    assert written.name == "report.html"
    found = files(written.parent)
    assert {"report.html", "report.md", "report.json"} <= found
    assert len([name for name in found if name.startswith("plots/")]) == 11
    assert len(found) == 14


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page(written)

    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    sources = page.values("src") + page.values("srcset")
    assert len(sources) == 22
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(target.startswith("#") for target in page.values("href"))
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "://" not in page.source


def test_links_within_the_page_lead_somewhere(written: Path) -> None:
    page = Page(written)

    anchors = Counter(page.values("id"))
    assert set(anchors.values()) == {1}
    assert {target[1:] for target in page.values("href")} <= set(anchors)
    assert set(page.values("aria-describedby")) <= set(anchors)


def test_every_image_says_what_it_shows(written: Path) -> None:
    page = Page(written)

    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 11
    assert all(len(image["alt"] or "") > 40 for image in images)
    assert all(int(image["width"] or 0) > 0 for image in images)


def test_the_page_shows_what_was_found_and_what_was_run(written: Path) -> None:
    text = Page(written).text

    for expected in (
        "Scores are those of the test split; the epoch of every run was selected on the dev split",
        "TelME, weighted F1 63.50 ± 0.71",
        "TelME less text teacher +2.50 ± 0.71 beyond the spread",
        "Shifting less concatenation −0.50 ± 2.12 within the spread",
        "python -m examples.fabricated --seeds 3,5",
        "train 80, dev 10, test 10",
        "Source: encoders.audio light",
        "telme_kd 0.0, torch 2.0",
        "1 h 2 min",
        "2 of 10 systems have an F1 of zero for fear in every run.",
    ):
        assert expected in text


def test_the_json_holds_the_results_and_the_tables(results: Any, written: Path) -> None:
    document = json.loads((written.parent / "report.json").read_text(encoding="utf-8"))
    found = document.pop("tables")
    assert document == results
    assert list(found) == [
        "headline",
        "ablation",
        "combinations",
        "students",
        "per_class",
        "systems",
        "runs",
    ]
    method = found["headline"][-1]
    assert method["key"] == METHOD
    assert method["weighted_f1"] == {
        "mean": pytest.approx(0.635),
        "deviation": pytest.approx(0.0070711, rel=1e-4),
        "count": 2,
    }
    assert method["against_concatenation"]["verdict"] == "within the spread"
    assert found["per_class"][0]["f1/neutral"]["mean"] == pytest.approx(0.71)


@pytest.mark.usefixtures("unillustrated")
def test_a_report_can_be_reported_again(results: Any, tmp_path: Path) -> None:
    del results["systems"][1:]
    first = report.write(results, tmp_path / "first").parent
    document = json.loads((first / "report.json").read_text(encoding="utf-8"))

    second = report.write(document, tmp_path / "second").parent

    assert files(first) == files(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files(first))
    assert report.rst_tables(document) == report.rst_tables(results)


@pytest.mark.usefixtures("unillustrated")
def test_words_in_the_json_are_left_as_they_are(short: Any, tmp_path: Path) -> None:
    short["title"] = "[E] and [1,2] and [ ]"
    short["recipe"] = "[3,4]"

    report.write(short, tmp_path)

    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (document["title"], document["recipe"]) == (short["title"], "[3,4]")


def test_the_markdown_shows_tables_and_pictures(written: Path) -> None:
    text = written.with_name("report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]{40,}\]\(([^)]*)\)", text)
    assert len(pictures) == 11
    assert all((written.parent / picture).is_file() for picture in pictures)
    assert "| Shifting | Response + feature | 2 | 63.50 ± 0.71 |" in text
    assert "(within the spread)" in text
    assert "**64.00 ± 2.83**" in text
    assert "Scores are those of the test split" in text
    assert "    python -m examples.fabricated --seeds 3,5\n" in text


@pytest.mark.usefixtures("unillustrated")
def test_markdown_tables_are_rectangular(short: Any, tmp_path: Path) -> None:
    short["systems"][0]["title"] = NASTY
    short["labels"][0] = "a|b"

    report.write(short, tmp_path)

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 8
    for block in blocks:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1
        assert len(block.splitlines()) > 2


def test_values_are_escaped_wherever_they_go(short: Any, tmp_path: Path) -> None:
    del short["systems"][1:]
    for place, key in ((short, "title"), (short, "command"), (short["source"], "folder")):
        place[key] = NASTY
    short["labels"][0] = NASTY
    short["systems"][0]["title"] = NASTY

    page = Page(report.write(short, tmp_path))

    assert not {"script"} & {tag for tag, _ in page.elements}
    assert page.text.count(NASTY) > 4
    assert any(NASTY in alt for alt in page.values("alt"))
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    # Only the indented command is taken literally, and there nothing is markup.
    loose = [line for line in markdown.splitlines() if "<script>" in line]
    assert loose == ["    " + NASTY]


@pytest.mark.usefixtures("unillustrated")
def test_without_visual_nothing_speaks_of_it(short: Any, tmp_path: Path) -> None:
    short["source"]["encoders"].pop("visual")

    page = Page(report.write(short, tmp_path))

    assert "visual" not in page.text.lower()
    assert "TelME less text teacher +2.00" in page.text


@pytest.mark.usefixtures("unillustrated")
def test_one_seed_shows_no_spread(short: Any, tmp_path: Path) -> None:
    short["seeds"] = [3]
    for system in short["systems"]:
        del system["runs"][1]

    page = Page(report.write(short, tmp_path))

    assert "±" not in page.source
    assert "+1.00 one seed" in page.text
    assert "±" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "±" not in report.table(short)
    assert "±" not in report.rst_tables(short)


@pytest.mark.usefixtures("unillustrated")
def test_a_teacher_alone_is_enough(results: Any, tmp_path: Path) -> None:
    del results["systems"][1:]

    page = Page(report.write(results, tmp_path))

    assert "“Text teacher” reaches a weighted F1 of 61.00 ± 1.41." in page.text
    assert "Ablation" not in page.text


def test_nothing_is_written_when_the_results_are_wrong(results: Any, tmp_path: Path) -> None:
    results["systems"][3]["runs"][1]["test"]["accuracy"] = 61.0

    with pytest.raises(InputError, match=r"\['accuracy'\]: expected a fraction .* got 61.0"):
        report.write(results, tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder_is_refused(results: Any, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")

    with pytest.raises(InputError, match=r"expected a folder, got the file .*; name another"):
        report.write(results, tmp_path / "report")

    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.usefixtures("unillustrated")
def test_a_failing_disk_leaves_the_old_report_whole(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del short["systems"][1:]
    report.write(short, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    short["title"] = "Another"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(short, tmp_path)

    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_the_printed_table_lines_up(results: Any) -> None:
    lines = report.table(results).splitlines()

    assert lines[0] == (
        "Fabricated: test split, epochs selected on dev; percent, mean ± sd over 2 seeds"
    )
    assert re.split(r" {2,}", lines[2])[1:] == ["Weighted F1", "Macro F1", "Accuracy", "vs teacher"]
    rows = lines[4:14]
    assert rows[0].startswith("Text teacher ")
    assert len({row.index("±") for row in rows}) == 1
    method = next(row for row in rows if row.startswith("Text + audio + visual by shifting, resp"))
    assert re.split(r" {2,}", method.strip())[1:] == [
        "63.50 ± 0.71",
        "51.50 ± 0.71",
        "64.50 ± 0.71",
        "+2.50 ± 0.71",
    ]
    assert lines[-1] == "~ smaller than its own sd over seeds"
    assert max(map(len, lines)) <= 122


def test_the_printed_table_marks_what_is_within_the_spread(results: Any) -> None:
    row = next(
        line
        for line in report.table(results).splitlines()
        if line.startswith("Text + audio + visual by shifting, not distilled")
    )

    assert row.endswith("-0.50 ± 2.12 ~")


def test_the_printed_table_refuses_wrong_results(results: Any) -> None:
    del results["systems"]

    with pytest.raises(InputError, match="systems"):
        report.table(results)


def test_the_rst_tables_are_well_formed(results: Any) -> None:
    nodes = pytest.importorskip("docutils.nodes")
    core = pytest.importorskip("docutils.core")
    results["title"] = NASTY
    results["systems"][0]["title"] = NASTY

    tree = core.publish_doctree(
        report.rst_tables(results),
        settings_overrides={"halt_level": 2, "report_level": 2, "warning_stream": False},
    )

    found = list(tree.findall(nodes.table))
    assert [table[0].astext() for table in found] == [
        f"{NASTY}: {title}" for title in ("Headline", "Ablation", "Modalities")
    ]
    entries = [entry.astext() for entry in found[0].findall(nodes.entry)]
    assert NASTY in entries
    assert "−0.50 ± 2.12 (within the spread)" in entries
    strong = {node.astext() for node in tree.findall(nodes.strong)}
    assert "64.00 ± 2.83" in strong
    assert "Scores are those of the test split" in tree.astext()
