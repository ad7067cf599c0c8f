import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.erc.check_report import manifest, summary, verdict, write, write_failure
from examples.erc.corpus_check import Examination, Expected, Facts, Finding

LABELS = ("joy", "fear")
FACTS = {
    "train": Facts(5200, 1038, {"joy": 4000, "fear": 1200}, {1: 38, 2: 900, 9: 100}, 7300.0, 12),
    "dev": Facts(20, 2, {"joy": 20, "fear": 0}, {2: 2}, 65.0, 0),
    "test": Facts(9, 1, {"joy": 4, "fear": 5}, {3: 1}, 4.25, 0),
}
EXPECTED = {
    "train": Expected(5200, 1038, {"joy": 4000}),
    "dev": Expected(20, 2, {"joy": 20}),
    "test": Expected(10, 1, {"joy": 4}),
}


def examination(**changes: Any) -> Examination:
    fields: dict[str, Any] = {
        "name": "meld", "title": "MELD", "layout": "tables", "labels": LABELS, "facts": FACTS,
        "expected": EXPECTED,
    }  # fmt: skip
    return Examination(**fields | changes)


def findings() -> list[Finding]:
    return [
        Finding("extra", "test", None, "test/<b>&x.mp4", "no line of the table names it", "them"),
        Finding("missing", "dev", "dev_dia1_utt0", "dev/dia1_utt0.mp4", "no file"),
        Finding("count", "test", None, None, "expected 10 utterances, got 9"),
        *(
            Finding("gap", "train", f"train_dia{n}", "t.csv", "no utterance 1", "them")
            for n in range(99)
        ),
    ]


class Page(HTMLParser):
    """Checks that every tag is closed in order, and notes the text."""

    VOID = ("meta", "img", "source", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_summary_has_the_counts_the_findings_and_the_verdict() -> None:
    lines = summary(
        examination(
            findings=findings(),
            not_checked=["clips: none"],
            clips={"clips": dict.fromkeys(FACTS, 7)},
        )
    ).splitlines()
    words = [line.split() for line in lines]
    assert lines[0] == "MELD, from tables"
    assert ["dialogues", "1,038", "2", "1", "as", "published"] in words
    assert ["utterances", "5,200", "20", "9", "published:", "5,200,", "20,", "10"] in words
    assert ["joy", "4,000", "20", "4", "as", "published"] in words
    assert ["fear", "1,200", "0", "5"] in words
    assert ["length", "2.0", "h", "1.1", "min", "4.2", "s"] in words
    assert ["texts", "repaired", "12", "0", "0"] in words
    assert ["clips", "opened", "7", "7", "7"] in words
    kinds = [line.split()[:3] for line in lines[lines.index("Not checked") - 20 :]]
    assert ["missing", "0", "1"] in kinds
    assert ["gap", "99", "0"] in kinds
    assert "  missing: dev_dia1_utt0: no file" in lines
    assert "  count: test: expected 10 utterances, got 9" in lines
    assert lines[-1] == "Something to look at: 2 findings are new (100 known)."
    assert max(map(len, lines)) <= 110


def test_summary_of_many_new_findings_shows_the_first() -> None:
    many = [Finding("missing", "dev", f"dev_dia{n}_utt0", None, "no file") for n in range(25)]
    text = summary(examination(findings=many))
    assert text.count(": no file") == 10
    assert "... and 15 more" in text


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([], "Usable: nothing was found."),
        (findings()[:1], "Usable: what was found is known, or makes no difference."),
        (findings()[1:2], "Something to look at: 1 finding is new (0 known)."),
    ],
)
def test_verdict(held: list[Finding], words: str) -> None:
    assert verdict(examination(findings=held)) == words


def test_manifest_holds_everything(tmp_path: Path) -> None:
    held = findings()
    write(examination(findings=held, not_checked=["clips: none"]), Path("data/MELD.Raw"), tmp_path)
    document = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert document == manifest(
        examination(findings=held, not_checked=["clips: none"]), Path("data/MELD.Raw")
    )
    assert (document["status"], document["error"], document["root"]) == (1, None, "data/MELD.Raw")
    assert document["splits"]["train"] == {
        "utterances": 5200,
        "dialogues": 1038,
        "classes": {"joy": 4000, "fear": 1200},
        "speakers": {"1": 38, "2": 900, "9": 100},
        "seconds": 7300.0,
        "repaired": 12,
        "opened": {},
    }
    assert len(document["findings"]) == len(held)
    assert document["findings"][0] == {
        "kind": "extra",
        "severity": "note",
        "split": "test",
        "subject": None,
        "file": "test/<b>&x.mp4",
        "detail": "no line of the table names it",
        "known": True,
        "source": "them",
    }
    assert [entry["severity"] for entry in document["findings"][1:3]] == ["warning", "error"]


def test_page_needs_no_other_file_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    path = write(examination(findings=findings(), not_checked=["a <i>"]), Path("<root>"), tmp_path)
    assert path == tmp_path / "check.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 2
    for text in ("<root>", "test/<b>&x.mp4", "a <i>", "dev_dia1_utt0", "99 known", "and 59 more"):
        assert text in page.text


def test_picture_is_beside_the_page(tmp_path: Path) -> None:
    write(examination(), Path("x"), tmp_path)
    picture = Image.open(io.BytesIO((tmp_path / "classes.png").read_bytes()))
    assert picture.width > 800
    blue = sum(
        count
        for count, colour in picture.convert("RGB").getcolors(1 << 24) or []
        if colour == (0, 114, 178)
    )
    assert blue > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "check.html", "check.json", "classes.png",
    ]  # fmt: skip


def test_failure_replaces_the_manifest_of_an_earlier_check(tmp_path: Path) -> None:
    write(examination(), Path("x"), tmp_path)
    write_failure("meld", Path("x"), "x: expected a table", tmp_path)
    document = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert (document["status"], document["error"]) == (2, "x: expected a table")
    write_failure("meld", Path("x"), "x: expected a table", tmp_path / "none")
    assert not (tmp_path / "none").exists()
